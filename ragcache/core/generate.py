"""Generate the answer to one request: prefill, decode, report, and store missing chunks."""

from __future__ import annotations

import collections.abc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ragcache.blend.full import Full
from ragcache.core.calibration import certified
from ragcache.core.consistent import MissingEncoder, check_window
from ragcache.core.missed import MissedChunks
from ragcache.core.prefill import PrefillContext, explain, prefill, usable
from ragcache.core.report import escalated_report, make_report
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Draft, Engine, Prefilled, Step
from ragcache.errors import StoreError
from ragcache.store.base import ChunkStore
from ragcache.store.tiers.overlay import OverlayStore
from ragcache.types import Answer, Explanation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GenerationStream", "Generator", "LocalGenerator"]


class Generator(Protocol):
    """Generates answers, in this process or with a server."""

    def stream(self, request: PromptRequest) -> GenerationStream:
        """Prepare an answer. Nothing is computed until the stream is read. Raises ConfigError for
        a mode that this generator does not support."""

    def explain(self, request: PromptRequest) -> Explanation:
        """What would be loaded for an answer now. Nothing is computed."""


@dataclass(frozen=True, slots=True)
class LocalGenerator(PrefillContext):
    """Generates answers with an engine of this process."""

    engine: Engine
    store_misses: bool = True  # store the KV of chunks that are missing

    def stream(self, request: PromptRequest) -> _LocalStream:
        return _LocalStream(self, usable(request, self.engine))

    def explain(self, request: PromptRequest) -> Explanation:
        return explain(self, request)


class GenerationStream(ABC):
    """An iterator over the pieces of the answer's text; afterwards ``answer`` is complete."""

    def __init__(self, request: PromptRequest) -> None:
        self.request = request
        self._pieces = self._run()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        """The remaining pieces. A second loop continues where the first one stopped."""
        return self._pieces

    def steps(self) -> Iterator[str | None]:
        """The remaining pieces, for a caller that must not block: None if none has arrived yet."""
        return self._pieces

    def close(self) -> None:
        """End the answer here, and free what it holds. A finished answer stays."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The finished answer; reads the rest of the stream first. RuntimeError if the stream was
        closed or has failed."""
        for _ in self._pieces:
            pass
        if self._answer is None:
            raise RuntimeError("the answer was not finished: the stream was closed or failed")
        return self._answer

    @property
    def no_chunks(self) -> str | None:
        """Why the prompt has no chunks, as in the report; None if it has some."""
        return self.request.no_chunks

    @property
    @abstractmethod
    def first_logits(self) -> Tensor:
        """Logits (vocabulary,), float32, of the prompt's last row, from which the first token was
        sampled. RuntimeError before the first piece was read."""

    @property
    @abstractmethod
    def misses(self) -> bool:
        """Whether :meth:`keep` has anything to do; False before the stream has ended."""

    @abstractmethod
    def keep(self) -> None:
        """Compute and store what was missing for this answer, after the stream has ended. A second
        call does nothing. Raises StoreError."""

    @abstractmethod
    def _run(self) -> collections.abc.Generator[str]:
        """Generate the answer piece by piece, and pass it to :meth:`_finish`."""

    def _finish(self, answer: Answer, store: ChunkStore) -> None:
        """Set the answer, and store what was missing if the request says so."""
        report = replace(
            answer.report,
            retrieval_s=self.request.retrieval_s,
            no_chunks=self.request.no_chunks,
        )
        self._answer = replace(answer, report=report)
        if self.request.keep and self.misses:
            self._answer = _keep_missing(self._answer, store, self.keep)


class _LocalStream(GenerationStream):
    """An answer that an engine of this process computes."""

    def __init__(self, generator: LocalGenerator, request: PromptRequest) -> None:
        self._generator = generator
        self._first_logits: Tensor | None = None
        self._forced_logits: Tensor | None = None
        self._missed: MissedChunks | None = None
        super().__init__(request)

    @property
    def first_logits(self) -> Tensor:
        if self._first_logits is None:
            raise RuntimeError("there are no logits yet: read the stream's first piece")
        return self._first_logits

    @property
    def forced_logits(self) -> Tensor:
        """Logits (tokens, vocabulary), float32, that predict the request's ``forced`` tokens, see
        :meth:`Engine.continuation_logits`. RuntimeError before the answer is finished, and if the
        request has none."""
        if self._forced_logits is None:
            raise RuntimeError("there are no logits: ask for forced tokens, and read the answer")
        return self._forced_logits

    @property
    def misses(self) -> bool:
        return self._missed is not None and bool(self._missed)

    def keep(self) -> None:
        missed, self._missed = self._missed, None
        if missed is not None:
            missed.store()

    def _run(self) -> collections.abc.Generator[str]:
        began = time.perf_counter()
        request, generator, encoder = self.request, self._generator, None
        overlapping = request.blender.placement == "overlapping"
        if overlapping:
            check_window(generator.engine, request)
        if overlapping or request.misses == "consistent":
            generator = replace(generator, store=OverlayStore(generator.store))
            encoder = MissingEncoder(generator.engine)
        done = prefill(generator, request, encoder)
        computed_before = bool(done.missed)
        encoded = {} if encoder is None else encoder.encoded
        missed = MissedChunks(generator.engine, self._generator, done, encoded)
        certificate = certified(
            request.certificate,
            done.plan,
            done.fused.prefilled.logits,
            is_full=not len(done.fused.layout.reusable),
        )
        discarded = None
        if certificate is not None and certificate.escalated:
            discarded = make_report(done, request.passages, generator.history)
            del done  # frees its KV
            certificate = replace(certificate, discarded_s=time.perf_counter() - began)
            done = prefill(generator, replace(request, blender=Full(), speeds=None))
        prefilled = done.fused.prefilled
        if request.forced == () and prefilled.repair is not None:
            raise ValueError("the answer repairs what it looks at: name the forced tokens")
        self._first_logits = prefilled.logits
        steps: list[Step] = []
        text, ttft = "", 0.0
        try:
            for step in self._decode(prefilled):
                ttft = ttft or time.perf_counter() - began
                steps.append(step)
                text += step.text
                if step.text:
                    yield step.text
                if request.until is not None and not step.stopped and request.until(text):
                    steps[-1] = replace(step, stopped="stop")
                    break
                if request.check is not None:
                    request.check()
        finally:  # an answer that is stopped is a turn of its chat, too
            self._keep_chat(prefilled, steps)
        total = time.perf_counter() - began
        if discarded is None:
            report = make_report(done, request.passages, generator.history)
        else:
            report = escalated_report(discarded, done.fused)
        report = replace(report, ttft_s=ttft, total_s=total, certificate=certificate)
        refusal = self._generator.store.refusal() if computed_before else None
        if refusal is not None:
            note = f"they are not stored for next time: {refusal}"
            report = replace(report, fallbacks=(*report.fallbacks, note))
        tokens = tuple(step.token for step in steps)
        if request.forced is not None and self._forced_logits is None:
            wanted = request.forced or tokens  # the first token may have ended the answer
            self._forced_logits = generator.engine.continuation_logits(prefilled, wanted)
        if generator.store_misses and refusal is None:
            self._missed = missed
        del done, prefilled  # frees the prompt's KV: what is to be stored has been copied
        self._finish(
            Answer(
                text=text,
                tokens=tokens,
                stopped=steps[-1].stopped or "length",
                passages=request.passages,
                prompt=request.prompt,
                report=report,
            ),
            self._generator.store,
        )

    def _keep_chat(self, prefilled: Prefilled, steps: Sequence[Step]) -> None:
        """Keep the KV of the prompt and of the answer so far for the next turn of a chat."""
        request, generator = self.request, self._generator
        if generator.chats is not None:
            rows = len(request.prompt) + request.sampling.max_tokens  # that were reserved
            generator.chats.keep(
                request,
                generator.encoding,
                generator.tenant,
                prefilled,
                tuple(step.token for step in steps),
                generator.engine.spec.chunk_bytes(rows),
            )

    def _decode(self, prefilled: Prefilled) -> Iterator[Step]:
        """The steps of the answer. Forced tokens are scored once the first step has been taken, so
        that they do not delay it."""
        engine, sampling, forced = (
            self._generator.engine,
            self.request.sampling,
            self.request.forced,
        )
        steps = engine.decode(prefilled, sampling)
        first = next(steps)
        yield first
        if forced:
            self._forced_logits = engine.continuation_logits(prefilled, forced)
            steps = engine.decode(prefilled, sampling, draft=Draft(forced, self._forced_logits))
            next(steps)
        if not first.stopped:
            yield from steps


def _keep_missing(answer: Answer, store: ChunkStore, keep: Callable[[], None]) -> Answer:
    """Call ``keep`` if this process may write to the store. If it may not, or ``keep`` fails, the
    answer's report says so."""
    why = store.refusal()
    if why is None:
        try:
            keep()
        except StoreError as error:
            why = str(error)
    if why is None:
        return answer
    missed = sum(chunk.miss is not None for chunk in answer.report.chunks)
    note = f"nothing is stored for next time, though {missed} chunks were missing: {why}"
    fallbacks = (*answer.report.fallbacks, note)
    return replace(answer, report=replace(answer.report, fallbacks=fallbacks))
