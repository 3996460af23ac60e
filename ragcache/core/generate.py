"""One question over given chunks: resolve, fuse, decode, account."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ragcache.blend import Blender
from ragcache.core.precompute import keep, precompute
from ragcache.core.prefill import FusedPrefill, PrefillContext
from ragcache.core.report import make_report
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.base import Engine, Step
from ragcache.errors import ConfigError, StoreError
from ragcache.planning.context import EncodingContext
from ragcache.planning.cost_model import Speeds
from ragcache.planning.lookup import chunk_keys
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.store.tiers.overlay import OverlayStore
from ragcache.types import Answer, ChunkKV, Passage, Prompt, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Generator(Protocol):
    """What answers questions: this process, or a server that it asks."""

    def stream(
        self,
        prompt: Prompt,
        blender: Blender,
        sampling: Sampling,
        *,
        passages: Sequence[Passage] = (),
        retrieval_s: float = 0.0,
        speeds: Speeds | None = None,
        check: Callable[[], None] | None = None,
        keep: bool = True,
    ) -> GenerationStream:
        """See :meth:`LocalGenerator.stream`."""


@dataclass(frozen=True, slots=True)
class LocalGenerator:
    """What it takes to answer: a model, its chunks' KV, and whose they are."""

    engine: Engine
    store: ChunkStore
    encoding: EncodingContext
    tenant: str = ""
    store_misses: bool = True  # keep the KV of chunks that were not at hand, for next time

    @property
    def fusing(self) -> PrefillContext:
        return PrefillContext(
            self.engine, self.store, self.encoding, self.tenant, self.store_misses
        )

    def stream(
        self,
        prompt: Prompt,
        blender: Blender,
        sampling: Sampling,
        *,
        passages: Sequence[Passage] = (),
        retrieval_s: float = 0.0,
        speeds: Speeds | None = None,
        check: Callable[[], None] | None = None,
        keep: bool = True,
    ) -> GenerationStream:
        """Start answering. Nothing runs until the stream is read.

        ``check`` is called before every layer and token: what it raises ends the answer there.
        ``keep``: compute and store what was missing at the end of the stream; else call
        :meth:`GenerationStream.keep`.

        With ``speeds``, what is loaded and at what ratio the rest is recomputed suits them (see
        :mod:`ragcache.planning.controller`); ``blender`` must be one that this ``controls``, and
        its own ratio is the least.
        """
        found = tuple(passages), retrieval_s
        return LocalStream(self, prompt, blender, sampling, *found, speeds, check, keep)


class GenerationStream(ABC):
    """Pieces of the answer's text as they come; ``answer`` once they are through.

    ``no_chunks``: why the prompt has no chunks, which the answer's report says too; None where it
    has some.
    """

    no_chunks: str | None = None

    def __init__(self) -> None:
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
        report = replace(self._answer.report, no_chunks=self.no_chunks)
        return replace(self._answer, report=report)

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
        """Make the answer, piece by piece, and leave it in ``_answer``."""


def kept(answer: Answer, store: ChunkStore, keep: Callable[[], None]) -> Answer:
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


class LocalStream(GenerationStream):
    """An answer that this process computes."""

    def __init__(
        self,
        answering: LocalGenerator,
        prompt: Prompt,
        blender: Blender,
        sampling: Sampling,
        passages: tuple[Passage, ...],
        retrieval_s: float,
        speeds: Speeds | None,
        check: Callable[[], None] | None,
        keep: bool,
    ) -> None:
        self._with, self._prompt, self._blender, self._speeds = answering, prompt, blender, speeds
        self._check, self._keep = check, keep
        self._fusion: _Fusion | None = None
        self._sampling, self._passages, self._retrieval_s = sampling, passages, retrieval_s
        self._first_logits: Tensor | None = None
        super().__init__()

    @property
    def first_logits(self) -> Tensor:
        if self._first_logits is None:
            raise RuntimeError("there are no logits yet: read the stream's first piece")
        return self._first_logits

    @property
    def misses(self) -> bool:
        return self._fusion is not None and self._with.store_misses and self._fusion.misses

    def keep(self) -> None:
        fusion, self._fusion = self._fusion, None
        if fusion is not None and self._with.store_misses:
            fusion.store_misses()

    def _run(self) -> Iterator[str]:
        began = time.perf_counter()
        fusion = _Fusion(
            self._with,
            self._prompt,
            self._blender,
            self._sampling.max_tokens,
            self._speeds,
            self._check,
        )
        self._first_logits = fusion.prefilled.logits
        steps: list[Step] = []
        ttft = 0.0
        for step in self._with.engine.decode(fusion.prefilled, self._sampling):
            ttft = ttft or time.perf_counter() - began
            steps.append(step)
            if step.text:
                yield step.text
            if self._check is not None:
                self._check()
        total = time.perf_counter() - began
        report = replace(
            make_report(
                fusion.fused, fusion.resolved, fusion.blender, self._passages, fusion.fallbacks
            ),
            ttft_s=ttft,
            total_s=total,
            retrieval_s=self._retrieval_s,
            plan=fusion.plan,
        )
        self._answer = Answer(
            text="".join(step.text for step in steps),
            tokens=tuple(step.token for step in steps),
            stopped=steps[-1].stopped or "length",
            passages=self._passages,
            prompt=self._prompt,
            report=report,
        )
        fusion.let_go()
        self._fusion = fusion
        if self._keep and self.misses:
            self._answer = kept(self._answer, self._with.store, self.keep)


class _Fusion(FusedPrefill):
    """A fusion whose misses are stored for next time."""

    def __init__(
        self,
        given: LocalGenerator,
        prompt: Prompt,
        blender: Blender,
        room: int,
        speeds: Speeds | None,
        check: Callable[[], None] | None,
    ) -> None:
        encoded = []
        if blender.placement == "overlapping":
            if (why := given.store.refusal()) is not None:
                given = replace(given, store=OverlayStore(given.store))
            encoded = _encode_missing(given, prompt, blender)
            if encoded and why is not None:
                encoded.append(f"they are not stored for next time: {why}")
        super().__init__(
            given.fusing, prompt, blender, room=room, speeds=speeds, check=check, fallbacks=encoded
        )
        self.answering = given
        self.captured, self.notes = self.fused.captured, self.fused.notes

    @property
    def misses(self) -> bool:
        """Whether there is anything to store, or a variant's use to be noted."""
        found = self.resolved
        missing = found.misses or not found.layout.prefix_loaded or found.served
        return self.blender.reuses != "nothing" and bool(missing or self.rotten or self._to_measure)

    def let_go(self) -> None:
        """Free the prompt's own KV. What :meth:`store_misses` needs was copied out of it."""
        del self.fused

    def store_misses(self) -> None:
        """Store the KV of the chunks, and of the prefix, that were not at hand."""
        engine, store = self.answering.engine, self.given.store
        if self.blender.reuses == "nothing":
            return
        for key in self.rotten:
            store.delete(key)
        if self.captured:
            missed = [self.resolved.keys[i] for i in sorted(self.resolved.misses)]
            notes = self.notes or [None] * len(missed)
            lacking = set(store.missing(missed))  # another answer may have stored the others
            for key, kv, seen in zip(missed, self.captured, notes, strict=True):
                if seen is not None:
                    keep(store, key, kv, seen)
                elif key in lacking:
                    keep(store, key, self._measured(key, kv), None)
        elif self.resolved.misses:
            precompute(engine, store, [self.resolved.keys[i] for i in self.resolved.misses])
        if not self.resolved.layout.prefix_loaded and self.resolved.prefix_key.tokens:
            precompute(engine, store, [self.resolved.prefix_key])
        if self._to_measure:
            precompute(engine, store, self._to_measure)
        if self.resolved.served:
            store.credit(self._worth())

    @property
    def _to_measure(self) -> list[ChunkKey]:
        """Keys of chunks that are stored as they are compiled, but without their sensitivity."""
        if self.blender.reuses != "encoded":
            return []
        every = [*self.resolved.unmeasured.values()]
        return [one.key for one in every if one.codec == self.resolved.prefix_key.codec]

    def _measured(self, key: ChunkKey, kv: ChunkKV) -> ChunkKV:
        """With its sensitivity where this is KV that is compiled behind the prefix: it is found
        under the same key by methods that ask for it."""
        if key.context != self.resolved.prefix_key.tokens:
            return kv
        [kv] = measure_sensitivity(self.answering.engine, [kv], key.context)
        return kv

    def _worth(self) -> dict[ChunkKey, float]:
        """What each variant's use was worth: 1 / CFO, at least 1 and at most 100."""
        names, worth = self.resolved.layout.names, {}
        for number, variant in self.resolved.served.items():
            cost = self.blender.overhead(variant.notes, names[:number])
            worth[variant.stored.key] = 1 / max(0.01, cost or 0.0)
        return worth


def _encode_missing(given: LocalGenerator, prompt: Prompt, blender: Blender) -> list[str]:
    """Overlapping chunks cannot be computed in place: encode what is missing first."""
    _check_window(given.engine, prompt)
    keys = chunk_keys(
        prompt, given.engine.fingerprint, blender.reuses, given.encoding, given.tenant
    )
    done = precompute(given.engine, given.store, keys)
    return [f"{done.encoded} chunks were not stored: encoded first"] if done.encoded else []


def _check_window(engine: Engine, prompt: Prompt) -> None:
    """Raise ConfigError where overlapping positions would fool a sliding window."""
    window = engine.sliding_window
    if window is not None and len(prompt) > window:
        raise ConfigError(
            f"overlapping positions cannot be used: {engine.name} has layers that see {window} "
            f"tokens, and this prompt has {len(prompt)}. Use positions=consecutive."
        )
