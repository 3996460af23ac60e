"""Generate answers over given chunks by vLLM servers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from ragcache.blend import Blender, written
from ragcache.core.calibration import certified
from ragcache.core.explain import chunk_names, part_reports
from ragcache.core.generate import GenerationStream
from ragcache.core.precompute import precompute
from ragcache.core.prefill import LookupContext
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Step
from ragcache.engine.decode import IncrementalDetokenizer
from ragcache.errors import ModelError
from ragcache.planning.lookup import PromptLookup
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey, digest_tokens
from ragcache.types import (
    Answer,
    ChunkKV,
    ChunkReport,
    Explanation,
    LayerTrace,
    Report,
)
from ragcache.vllm.handoff import new_ticket
from ragcache.vllm.http import ServerUnreachable
from ragcache.vllm.jobs import check_mode
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt, tenant_salt

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.vllm.engine import VllmEngine

__all__ = ["VllmGenerator"]

_POLL_S = 0.005
_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class VllmGenerator(LookupContext):
    """Generates answers by servers, which load the KV of chunks from a tenant's store."""

    engine: VllmEngine

    def stream(self, request: PromptRequest) -> GenerationStream:
        """Start an answer. ``request.speeds`` is ignored: the servers' speeds are not known."""
        check_mode(request.blender)
        return _VllmStream(self, request)

    def explain(self, request: PromptRequest) -> Explanation:
        """What the servers would load now; they may have more in prefix caches of their own."""
        found = self.look_up(request, count=False)
        names = chunk_names(request.prompt, [passage.chunk.id for passage in request.passages])
        parts = part_reports(found, names, self.history)
        return Explanation(request.blender.mode, parts, request.passages, request.no_chunks)


class _VllmStream(GenerationStream):
    """An answer that is streamed from a server, and continued by another one if that fails.

    The other server gets the tokens so far as a part of the prompt.
    """

    def __init__(self, generator: VllmGenerator, request: PromptRequest) -> None:
        self._generator, self._engine, self._prompt = generator, generator.engine, request.prompt
        self._blender, self._sampling = request.blender, request.sampling
        self._resolved: PromptLookup | None = None
        self._fallbacks: list[str] = []
        self._reply: dict[str, Any] | None = None  # the first one; empty if the worker wrote none
        self._taken: set[str] = set()
        self._wait_s, self._steps = _WAIT_S, self._generate()
        super().__init__(request)

    @property
    def first_logits(self) -> Tensor:
        raise RuntimeError("a vLLM server returns no logits: request logprobs from it")

    @property
    def misses(self) -> bool:
        found = self._resolved
        if found is None or self._answer is None:
            return False
        return bool(self._missing_texts(found) or self._missing_chunks(found))

    def keep(self) -> None:
        found, self._resolved = self._resolved, None
        if found is not None and self._answer is not None:
            store = self._generator.store
            _store_texts(self._engine, store, self._missing_texts(found))
            precompute(self._engine, store, self._missing_chunks(found))

    def _missing_chunks(self, found: PromptLookup) -> list[ChunkKey]:
        """Keys of missing chunks that are worth storing: KV that does not depend on the prompt."""
        if self._blender.reuses != "encoded":
            return []
        chunks = [found.keys[number] for number in found.misses]
        return [*chunks, *(one.key for one in found.unmeasured.values())]

    def _missing_texts(self, found: PromptLookup) -> list[ChunkKey]:
        """Keys of the texts before the first chunk that are not stored. Without chunks there are
        none: vLLM's own prefix cache has the texts of such a prompt."""
        if self._blender.reuses != "encoded" or not self._prompt.chunks:
            return []
        return list(found.missing_texts.values())

    def steps(self) -> Iterator[str | None]:
        self._wait_s = _POLL_S
        return self._steps

    def close(self) -> None:
        self._steps.close()

    def _run(self) -> Generator[str]:
        return (piece for piece in self._steps if piece is not None)

    def _generate(self) -> Generator[str | None]:
        """Pieces of text, and None whenever no token has arrived for a while."""
        began = time.perf_counter()
        self._resolved = self._generator.look_up(self.request)
        steps: list[Step] = []
        ttft = 0.0
        speller = IncrementalDetokenizer(self._engine.tokenizer, self._engine.ends, self._sampling)
        with closing(self._tokens()) as tokens:
            for token in tokens:
                if self.request.check is not None:
                    self.request.check()
                if token is None:
                    yield None
                    continue
                ttft = ttft or time.perf_counter() - began
                steps.append(step := speller.push(token))
                if step.text:
                    yield step.text
                if step.stopped:
                    break
        report = replace(self._report(), ttft_s=ttft, total_s=time.perf_counter() - began)
        self._finish(
            Answer(
                text="".join(step.text for step in steps),
                tokens=tuple(step.token for step in steps),
                stopped=steps[-1].stopped or "length",
                passages=self.request.passages,
                prompt=self._prompt,
                report=report,
            ),
            self._generator.store,
        )

    def _tokens(self) -> Generator[int | None]:
        """Tokens of the answer, from as many servers as needed; None if there is none yet."""
        given: list[int] = []
        lost: list[str] = []
        chunks = {
            digest_tokens(part.stored or part.tokens): len(part.tokens)
            for part in self._prompt.parts
            if part.is_chunk
        }
        while (url := self._engine.replicas.choose(chunks, without=lost)) is not None:
            body, name = self._request_body(given)
            with closing(self._engine.client.stream(url, body)) as stream:
                try:
                    for token in stream.poll(lambda: self._wait_s):
                        if token is not None:
                            self._take_reply(name, url)
                            given.append(token)
                        yield token
                    return
                except ServerUnreachable as error:
                    lost.append(url)
                    self._fallbacks.append(
                        f"continued on another server after {len(given)} tokens: {error}"
                    )
        raise ModelError(f"no vLLM server answers: {', '.join(lost)} cannot be reached. Start one.")

    def _request_body(self, given: list[int]) -> tuple[dict[str, Any], str]:
        """The body of a request for the tokens after ``given``, and its ticket."""
        prompt = self._prompt.continued(tuple(given))
        sampling, tenant = self._sampling, self._generator.tenant
        body: dict[str, Any] = {
            "prompt": list(prompt.tokens),
            "max_tokens": sampling.max_tokens - len(given),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed + len(given)
        assert self._resolved is not None
        if not any(self._resolved.layout.loaded):
            # No chunk to fuse: vLLM's own prefill is exact, and its prefix cache has the texts that
            # other such prompts began with. Fused requests share no blocks with other prompts.
            return body | _salt_field(tenant_salt(tenant)), ""
        manifest = Manifest.fuse(
            prompt,
            written(self._blender),
            self._engine.fingerprint.digest,
            encoding=self._generator.encoding,
            tenant=tenant,
            ticket=new_ticket(),
        )
        body["kv_transfer_params"] = manifest.params()
        return body | _salt_field(cache_salt(manifest)), manifest.ticket

    def _take_reply(self, ticket: str, url: str) -> None:
        """Read the worker's reply, once per ticket. Raises ModelError for a refusal."""
        if not ticket or ticket in self._taken:
            return
        self._taken.add(ticket)
        worker_reply = self._engine.replies.take_report(ticket) or {}
        self._reply = self._reply or worker_reply
        if (why := worker_reply.get("refused")) is not None:
            raise ModelError(
                f"vLLM at {url} loads nothing for this prompt: {why}. Its log has the details."
            )

    def _report(self) -> Report:
        """The worker's report; without one, that of a prompt that vLLM computed or had cached."""
        assert self._resolved is not None
        found, history = self._resolved, self._generator.history
        names = chunk_names(self._prompt, [p.chunk.id for p in self.request.passages])
        if self._reply and "report" in self._reply:
            report = _read_report(self._reply["report"], names, self._fallbacks)
        else:
            if self._reply is not None:
                self._fallbacks.append("vLLM had the fused prompt in its prefix cache")
            report = _report_without_work(found, self._blender, names, self._fallbacks)
        parts = part_reports(found, names, history)
        if history is not None:
            history.remember(found, names)
        is_full = not any(found.layout.loaded)
        certificate = certified(self.request.certificate, None, None, is_full=is_full)
        return replace(report, parts=parts, certificate=certificate)


def _read_report(given: dict[str, Any], names: Sequence[str], fallbacks: Sequence[str]) -> Report:
    """A worker's report from JSON, with the chunks' names and more fallbacks."""
    chunks = [
        ChunkReport(**{**chunk, "id": name})
        for chunk, name in zip(given["chunks"], names, strict=True)
    ]
    return Report(
        **{
            **given,
            "chunks": tuple(chunks),
            "layers": tuple(LayerTrace(**layer) for layer in given["layers"]),
            "fallbacks": (*given["fallbacks"], *fallbacks),
            "computed": tuple(given["computed"]),
        }
    )


def _report_without_work(
    found: PromptLookup, blender: Blender, names: Sequence[str], fallbacks: Sequence[str]
) -> Report:
    """The report of an answer whose whole prompt vLLM computed or had cached."""
    prompt, loaded = found.layout.prompt, any(found.layout.loaded)
    prefix, tokens = len(prompt.prefix), sum(map(len, prompt.chunks))
    return Report(
        mode=blender.mode,
        parameters=blender.parameters,
        prefix_tokens=prefix,
        chunk_tokens=tokens,
        question_tokens=len(prompt) - prefix - tokens,
        reused_tokens=tokens if loaded else 0,
        recomputed_tokens=0,
        charged_budget=0.0 if loaded else 1.0,
        bytes_loaded=0,
        ttft_s=0.0,
        total_s=0.0,
        chunks=tuple(
            ChunkReport(
                name,
                len(chunk),
                0 if loaded else len(chunk),
                0.0 if loaded else 1.0,
                miss.reason if (miss := found.misses.get(number)) is not None else None,
            )
            for number, (name, chunk) in enumerate(zip(names, prompt.chunks, strict=True))
        ),
        fallbacks=tuple(fallbacks),
    )


def _store_texts(engine: VllmEngine, store: ChunkStore, keys: Sequence[ChunkKey]) -> None:
    """Store the missing ones of consecutive texts of a prompt, computed by a server in one pass."""
    missing = set(store.missing(keys))  # another request may have stored some
    due = list(dropwhile(lambda key: key not in missing, keys))
    if not due:
        return
    tokens = tuple(token for key in due for token in key.tokens)
    [whole] = engine.encode([tokens], context=due[0].context)
    texts, start = [], 0
    for key in due:
        rows = slice(start, start := start + len(key.tokens))
        keys_, values = (tuple(t[:, rows] for t in side) for side in (whole.keys, whole.values))
        texts.append((key, ChunkKV(key.tokens, keys_, values)))
    store.put_all(texts)


def _salt_field(salt: str | None) -> dict[str, str]:
    return {} if salt is None else {"cache_salt": salt}
