"""Observe what rows could be chosen by: the question's attention to the tokens of chunks, over
stored KV and in full prefill, and the errors of stored KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, Selector
from ragcache.blend.fuse import fuse
from ragcache.blend.ranking import QuestionAttention, band, mean, peak
from ragcache.core.generate import LocalGenerator
from ragcache.core.prefill import prefill
from ragcache.core.request import PromptRequest
from ragcache.core.sensitivity import relative_change
from ragcache.engine.base import AttentionCall, AttentionRule, Engine
from ragcache.planning.context import EncodingContext
from ragcache.store.base import ChunkStore, Miss
from ragcache.store.memory import MemoryStore
from ragcache.store.prefetch import LayerReader
from ragcache.types import ChunkKV, Prompt, Tokens


@dataclass(frozen=True)
class Observed:
    """What is known about the ``n`` tokens of a prompt's chunks.

    Errors are those of the stored KV, see :func:`ragcache.core.sensitivity.relative_change`.
    Attention weights are those of the question over the stored KV, as a probe sees them, or those
    of the question and of its answer in full prefill.
    """

    rows: Tensor  # (n,), int64: in the prompt
    chunk: Tensor  # (n,), int64: the number of the chunk
    sensitivity: Tensor  # (n,)
    mean: Tensor  # (n,): weights, mean over heads and tokens, summed over layers
    peak: Tensor  # (layers, n): maximum over heads and tokens
    true_peak: Tensor  # (layers, n): the same of full prefill
    key_error: Tensor  # (layers, n)
    value_error: Tensor  # (layers, n)
    count: int = 0  # rows to choose

    @property
    def peaks(self) -> Tensor:
        """The peaks, summed over layers, (n,)."""
        return self.peak.sum(0)

    @property
    def middle_peaks(self) -> Tensor:
        """The same over the middle third of the layers."""
        middle = band("middle", len(self.peak))
        return self.peak[middle.start : middle.stop].sum(0)


@dataclass(frozen=True)
class By(Blender):
    """Computes the rows of the selector that ``make`` makes for a prompt and a number of layers."""

    make: Callable[[Layout, int], Selector]
    name: ClassVar[str] = "by"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return self.make(layout, layers)


@dataclass(frozen=True)
class _Watching(Selector):
    """Keeps the peak attention of the last part to the rows of the chunks, layer by layer."""

    layout: Layout
    peaks: list[Tensor]  # per layer, (n,)

    @property
    def attend(self) -> AttentionRule:
        return self._see

    def first(self) -> Tensor:
        return self.layout.reusable

    def _see(self, call: AttentionCall) -> None:
        weights = call.softmax(call.scores(self.layout.asking))
        spans = [weights[:, :, start:stop] for start, stop in self.layout.prompt.spans]
        self.peaks.append(peak(torch.cat(spans, 2)).cpu())


def observe(
    engine: Engine, store: ChunkStore, encoding: EncodingContext, prompt: Prompt, answer: Tokens
) -> Observed:
    """Look at the stored KV of a prompt's chunks, and at full prefill of it and its ``answer``."""
    means: list[Tensor] = []
    peaks: list[Tensor] = []

    def see(weights: Tensor) -> Tensor:
        means.append(mean(weights).cpu())
        peaks.append(peak(weights).cpu())
        return peaks[-1]

    probed = By(lambda layout, layers: QuestionAttention(layout, 1, range(layers), see))
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    found = prefill(generator, PromptRequest(prompt, probed)).found
    stored = [kv for kv in map(store.get, found.keys) if not isinstance(kv, Miss)]
    exact, true_peak = in_full(engine, prompt, answer)
    return Observed(
        rows=found.layout.reusable,
        chunk=found.layout.chunk_of,
        sensitivity=found.layout.sensitivity,
        mean=torch.stack(means).sum(0),
        peak=torch.stack(peaks),
        true_peak=true_peak,
        key_error=_errors([kv.keys for kv in stored], [kv.keys for kv in exact]),
        value_error=_errors([kv.values for kv in stored], [kv.values for kv in exact]),
    )


def in_full(engine: Engine, prompt: Prompt, answer: Tokens) -> tuple[Sequence[ChunkKV], Tensor]:
    """In full prefill, the KV of every chunk, and the peak attention of the question and of
    ``answer`` after it to all of their rows, (layers, n)."""
    longer = Prompt.of(prompt.prefix, prompt.chunks, prompt.question + answer)
    count, peaks = len(prompt.chunks), list[Tensor]()
    layout = Layout(longer, (False,) * count, 0, tuple(range(len(longer))))
    watched = By(lambda layout, _: _Watching(layout, peaks))
    with LayerReader(MemoryStore(), ()) as nothing:
        fused = fuse(engine, watched, layout, nothing, capture=range(count))
    return fused.captured, torch.stack(peaks)


def _errors(stored: Sequence[Sequence[Tensor]], exact: Sequence[Sequence[Tensor]]) -> Tensor:
    """Of all chunks, each given as its layers, the errors, (layers, n)."""
    pairs = zip(stored, exact, strict=True)
    return torch.cat([torch.stack([*map(relative_change, *pair)]) for pair in pairs], 1)
