"""An answer to one request: prefill, decode, report, and what is stored for next time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ragcache.core.missed import MissedChunks, encode_missing
from ragcache.core.prefill import PrefillContext, prefill
from ragcache.core.report import make_report
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine, Step
from ragcache.errors import StoreError
from ragcache.store.base import ChunkStore
from ragcache.store.tiers.overlay import OverlayStore
from ragcache.types import Answer

if TYPE_CHECKING:
    from torch import Tensor


class Generator(Protocol):
    """Generates answers: in this process, or by a server."""

    def stream(self, request: PromptRequest) -> GenerationStream:
        """Start an answer. Nothing runs until the stream is read. Raises ConfigError for a mode
        that cannot be used here."""


@dataclass(frozen=True, slots=True)
class LocalGenerator(PrefillContext):
    """Generates answers with an engine of this process."""

    engine: Engine
    store_misses: bool = True  # store the KV of chunks that were not stored, for next time

    def stream(self, request: PromptRequest) -> GenerationStream:
        return LocalStream(self, request)


class GenerationStream(ABC):
    """Pieces of the answer's text as they come; ``answer`` once they are through."""

    def __init__(self, request: PromptRequest) -> None:
        self.request = request
        self._pieces = self._run()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        """What is still to come; a second loop goes on where the first one stopped."""
        return self._pieces

    def steps(self) -> Iterator[str | None]:
        """The same for a caller that must not block: None while no piece has come yet."""
        return self._pieces

    @property
    def answer(self) -> Answer:
        """The finished answer; reads the rest of the stream first."""
        for _ in self._pieces:
            pass
        if self._answer is None:
            raise RuntimeError("the answer was not finished: the stream was closed or failed")
        return self._answer

    @property
    def no_chunks(self) -> str | None:
        """Why the prompt has no chunks, as the report says too; None where it has some."""
        return self.request.no_chunks

    @property
    @abstractmethod
    def first_logits(self) -> Tensor:
        """Logits (vocabulary,), float32, that the answer's first token was taken from: those of
        the prompt's last row. RuntimeError before the first piece was read."""

    @property
    @abstractmethod
    def misses(self) -> bool:
        """Whether :meth:`keep` has anything to do; False before the stream is through."""

    @abstractmethod
    def keep(self) -> None:
        """Compute and store what this answer missed, once it is finished. A second call does
        nothing."""

    @abstractmethod
    def _run(self) -> Iterator[str]:
        """Generate the answer, piece by piece, and leave it in ``_answer``."""

    def _finish(self, answer: Answer, store: ChunkStore) -> None:
        """Leave the answer, and store what it missed where the request says so."""
        report = replace(
            answer.report,
            retrieval_s=self.request.retrieval_s,
            no_chunks=self.request.no_chunks,
        )
        self._answer = replace(answer, report=report)
        if self.request.keep and self.misses:
            self._answer = _kept(self._answer, store, self.keep)


class LocalStream(GenerationStream):
    """An answer that this process computes."""

    def __init__(self, generator: LocalGenerator, request: PromptRequest) -> None:
        self._generator = generator
        self._first_logits: Tensor | None = None
        self._missed: MissedChunks | None = None
        super().__init__(request)

    @property
    def first_logits(self) -> Tensor:
        if self._first_logits is None:
            raise RuntimeError("there are no logits yet: read the stream's first piece")
        return self._first_logits

    @property
    def misses(self) -> bool:
        return self._missed is not None and bool(self._missed)

    def keep(self) -> None:
        missed, self._missed = self._missed, None
        if missed is not None:
            missed.store()

    def _run(self) -> Iterator[str]:
        began = time.perf_counter()
        request, generator, fallbacks = self.request, self._generator, list[str]()
        if request.blender.placement == "overlapping":
            if (why := generator.store.refusal()) is not None:
                generator = replace(generator, store=OverlayStore(generator.store))
            fallbacks = encode_missing(generator.engine, generator, request)
            if fallbacks and why is not None:
                fallbacks.append(f"they are not stored for next time: {why}")
        done = prefill(generator, request)
        self._first_logits = done.fused.prefilled.logits
        steps: list[Step] = []
        ttft = 0.0
        for step in generator.engine.decode(done.fused.prefilled, request.sampling):
            ttft = ttft or time.perf_counter() - began
            steps.append(step)
            if step.text:
                yield step.text
            if request.check is not None:
                request.check()
        total = time.perf_counter() - began
        report = replace(
            make_report(done, request.passages, fallbacks),
            ttft_s=ttft,
            total_s=total,
            plan=done.plan,
        )
        if generator.store_misses:
            self._missed = MissedChunks(generator.engine, generator, done)
        del done  # the prompt's own KV is freed: what is stored was copied out of it
        self._finish(
            Answer(
                text="".join(step.text for step in steps),
                tokens=tuple(step.token for step in steps),
                stopped=steps[-1].stopped or "length",
                passages=request.passages,
                prompt=request.prompt,
                report=report,
            ),
            self._generator.store,
        )


def _kept(answer: Answer, store: ChunkStore, keep: Callable[[], None]) -> Answer:
    """Have what an answer missed stored, by ``keep``, if this process may write. The answer is
    there, whatever becomes of that: its report says what was not stored, and why."""
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
