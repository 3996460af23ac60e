"""One question over given chunks, answered by a vLLM server."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ragcache.blend import Blender, written
from ragcache.core.generate import GenerationStream
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Step
from ragcache.engine.decode import IncrementalDetokenizer
from ragcache.errors import ModelError
from ragcache.planning.context import EncodingContext
from ragcache.planning.lookup import PromptLookup, look_up
from ragcache.store.base import ChunkStore
from ragcache.store.key import digest_tokens
from ragcache.types import (
    Answer,
    ChunkReport,
    LayerTrace,
    Report,
)
from ragcache.vllm.handoff import ticket
from ragcache.vllm.http import Unreachable
from ragcache.vllm.jobs import check_usable
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import salt, tenant_salt

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.vllm.engine import VllmEngine

_POLL_S = 0.005
_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class VllmGenerator:
    """What it takes to answer: servers, the chunks' KV that they load, and whose it is."""

    engine: VllmEngine
    store: ChunkStore
    encoding: EncodingContext
    tenant: str = ""

    def stream(self, request: PromptRequest) -> GenerationStream:
        """Start an answer. ``request.speeds`` are not used: the servers' speeds are not known."""
        check_usable(request.blender)
        return VllmStream(self, request)


class VllmStream(GenerationStream):
    """An answer whose tokens come from a server, and from another where that one is lost.

    The other goes on behind the tokens that were given: they become a part of the prompt.
    """

    def __init__(self, generator: VllmGenerator, request: PromptRequest) -> None:
        self._with, self._engine, self._prompt = generator, generator.engine, request.prompt
        self._blender, self._sampling = request.blender, request.sampling
        self._resolved: PromptLookup | None = None
        self._fallbacks: list[str] = []
        self._letter: dict[str, Any] | None = None  # the first; empty where none was left
        self._opened: set[str] = set()
        self._wait_s, self._steps = _WAIT_S, self._stepping()
        super().__init__(request)

    @property
    def first_logits(self) -> Tensor:
        raise RuntimeError("a vLLM server hands no logits over: ask for logprobs there")

    @property
    def misses(self) -> bool:
        found = self._resolved
        return found is not None and self._answer is not None and bool(self._missing(found))

    def keep(self) -> None:
        found, self._resolved = self._resolved, None
        if found is not None and self._answer is not None:
            precompute(self._engine, self._with.store, self._missing(found))

    def _missing(self, found: PromptLookup) -> list[Any]:
        """Keys of what is worth storing. What is computed in a prompt's company stays there."""
        if self._blender.behind != "compiled" or self._with.encoding.similar:
            return []
        prefix = [] if found.layout.prefix_loaded else [found.prefix_key]
        chunks = [found.keys[number] for number in found.misses]
        chunks += [one.key for one in found.unmeasured.values()]
        return [key for key in (*prefix, *chunks) if key.tokens]

    def steps(self) -> Iterator[str | None]:
        self._wait_s = _POLL_S
        return self._steps

    def _run(self) -> Iterator[str]:
        return (piece for piece in self._steps if piece is not None)

    def _stepping(self) -> Iterator[str | None]:
        """Pieces of text; None where nothing has come for a while."""
        began = time.perf_counter()
        given = self._with
        self._resolved = look_up(
            self._prompt,
            self._blender,
            given.store,
            self._engine.fingerprint,
            encoding=given.encoding,
            tenant=given.tenant,
        )
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
            self._with.store,
        )

    def _tokens(self) -> Generator[int | None]:
        """Tokens of the answer, from as many servers as it takes; None where there is none yet."""
        given: list[int] = []
        lost: list[str] = []
        chunks = {digest_tokens(chunk): len(chunk) for chunk in self._prompt.chunks}
        while (url := self._engine.replicas.choose(chunks, without=lost)) is not None:
            body, name = self._body(given)
            with closing(self._engine.client.stream(url, body)) as stream:
                try:
                    for token in stream.poll(lambda: self._wait_s):
                        if token is not None:
                            self._open(name, url)
                            given.append(token)
                        yield token
                    return
                except Unreachable as error:
                    lost.append(url)
                    self._fallbacks.append(
                        f"went on at another server behind {len(given)} tokens: {error} was lost"
                    )
        raise ModelError(f"no vLLM server answers: {', '.join(lost)} are lost. Start one.")

    def _body(self, given: list[int]) -> tuple[dict[str, Any], str]:
        """A request for what is to come behind the tokens that were given, and its ticket."""
        prompt = replace(self._prompt, question=self._prompt.question + tuple(given))
        sampling, tenant = self._sampling, self._with.tenant
        body: dict[str, Any] = {
            "prompt": list(prompt.tokens),
            "max_tokens": sampling.max_tokens - len(given),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed + len(given)
        assert self._resolved is not None
        if not any(self._resolved.layout.loaded):  # nothing to fuse: vLLM's own prefill is exact
            return body | _salted(tenant_salt(tenant)), ""
        encoding = self._with.encoding
        manifest = Manifest.fuse(
            prompt,
            written(self._blender),
            self._engine.fingerprint.digest,
            compiled=encoding.mode,
            behind=None if encoding.behind == prompt.prefix else encoding.behind,
            tenant=tenant,
            ticket=ticket(),
        )
        body["kv_transfer_params"] = manifest.params()
        return body | _salted(salt(manifest)), manifest.ticket

    def _open(self, ticket: str, url: str) -> None:
        """Take the letter that was left before the first token. ModelError for a refusal."""
        if not ticket or ticket in self._opened:
            return
        self._opened.add(ticket)
        letter = self._engine.mailbox.take(ticket) or {}
        self._letter = self._letter or letter
        if (why := letter.get("refused")) is not None:
            raise ModelError(
                f"vLLM at {url} loads nothing for this prompt: {why}. Its log says more."
            )

    def _report(self) -> Report:
        """What the worker says of its work; what must have been where it had none to do."""
        assert self._resolved is not None
        names = [p.chunk.id for p in self.request.passages] or list(
            map(str, range(1, 1 + len(self._prompt.chunks)))
        )
        if self._letter and "report" in self._letter:
            return report(self._letter["report"], names, self._fallbacks)
        if self._letter is not None:
            self._fallbacks.append("vLLM had this very prompt, fused, in its prefix cache")
        return _without_work(self._resolved, self._blender, names, self._fallbacks)


def report(given: dict[str, Any], names: Sequence[str], fallbacks: Sequence[str]) -> Report:
    """A worker's report, read from JSON, with the chunks' names and with more fallbacks."""
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


def _without_work(
    found: PromptLookup, blender: Blender, names: Sequence[str], fallbacks: Sequence[str]
) -> Report:
    """The report of an answer for which ragcache's worker did nothing: vLLM computed or cached all
    of it."""
    prompt, loaded = found.layout.prompt, any(found.layout.loaded)
    tokens = sum(map(len, prompt.chunks))
    return Report(
        mode=blender.mode,
        parameters=blender.parameters,
        prefix_tokens=len(prompt.prefix),
        chunk_tokens=tokens,
        question_tokens=len(prompt.question),
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


def _salted(salt: str | None) -> dict[str, str]:
    return {} if salt is None else {"cache_salt": salt}
