"""Fusion: walk the layers once, placing stored KV and computing the rows that were chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Chosen, KVPair, KVSource, Layout, Selector
from ragcache.blend.company import Company
from ragcache.errors import ConfigError
from ragcache.types import ChunkKV, ChunkNotes, LayerTrace

if TYPE_CHECKING:
    from ragcache.engine.base import Engine, LayerView, Prefilled


@dataclass(frozen=True, slots=True)
class FusedPrompt:
    """A fused prompt, ready to decode, and the account of how it came to be."""

    prefilled: Prefilled
    layout: Layout
    layers: tuple[LayerTrace, ...]
    chosen: tuple[Tensor, ...]  # per layer, the reusable rows that were computed
    captured: tuple[ChunkKV, ...] = ()  # of the chunks that were asked for
    notes: tuple[ChunkNotes, ...] = ()  # on the same chunks, where the method loads variants
    probed: int = 0  # rows computed by a probe, summed over its layers

    @property
    def charged_budget(self) -> float:
        """(sum_l |A_l & reusable| + probed) / (L * reusable); 1 where nothing was reusable."""
        reusable = len(self.layout.reusable)
        if reusable == 0:
            return 1.0
        return (sum(map(len, self.chosen)) + self.probed) / (len(self.chosen) * reusable)


def fuse(
    engine: Engine,
    blender: Blender,
    layout: Layout,
    source: KVSource,
    *,
    room: int = 1,
    capture: Sequence[int] = (),
) -> FusedPrompt:
    """Prefill ``layout.prompt`` with the stored KV of ``source`` under ``blender``.

    ``source`` yields the prefix first, if it is loaded, then the loaded chunks in order. Every
    question row is computed at every layer, and so is every row whose KV is not at hand.
    ``capture`` numbers chunks, of those whose KV is not loaded, whose KV is to be returned as it
    comes to stand in this prompt, with notes on what they attend to if the method loads variants.
    Raises StoreError if ``source`` cannot read what it had promised, and ConfigError where the
    method looks at attention but the engine does not show it.
    """
    layers, tokens, positions = engine.spec.layers, layout.prompt.tokens, layout.positions
    selector = blender.selector(layout, layers)
    probe = selector.probe if len(layout.reusable) else None
    attend = selector.attend
    noted = Company(layout, capture, attend) if capture and blender.behind == "variant" else None
    if (probe or attend or blender.behind == "variant") and not engine.watchable:
        raise ConfigError(
            f"mode {blender.mode} looks at attention weights, which {engine.name} does not show. "
            "Use cacheblend, reuse or full."
        )
    if probe is not None:
        source = Kept(source)
        walk = FusionWalk(Chosen(layout.reusable[:0]), layout, source)
        engine.probe(tokens, walk, probe.see, positions=positions, layers=probe.layers)
    walk = FusionWalk(selector, layout, source, capture)
    prefilled = engine.prefill(tokens, walk, positions=positions, room=room, attend=noted or attend)
    if not selector.lasting:
        prefilled = replace(prefilled, attend=None)
    return FusedPrompt(
        prefilled,
        layout,
        walk.finish(),
        tuple(walk.chosen),
        walk.captured(),
        tuple(map(noted.notes, capture)) if noted is not None else (),
        len(layout.fresh) * probe.layers if probe is not None else 0,
    )


class Kept:
    """A KVSource that keeps what it has yielded, and yields it again from the first layer on."""

    def __init__(self, source: KVSource) -> None:
        self.source = source
        self._layers: list[list[KVPair]] = []

    @property
    def bytes_loaded(self) -> int:
        return self.source.bytes_loaded

    def layer(self, layer: int) -> list[KVPair]:
        if layer == len(self._layers):
            self._layers.append(self.source.layer(layer))
        return self._layers[layer]


class FusionWalk:
    """The Walk of one fusion. At layer l it computes ``fresh | chosen_l``."""

    def __init__(
        self, selector: Selector, layout: Layout, source: KVSource, capture: Sequence[int] = ()
    ) -> None:
        self.selector, self.layout, self.source = selector, layout, source
        self._captured: dict[int, list[KVPair]] = {index: [] for index in capture}
        self.chosen: list[Tensor] = []
        self._starts = _starts(layout)
        self._stored: KVPair | None = None  # of the chosen rows, kept where they are compared
        self._fresh: KVPair | None = None  # the same rows as computed
        self._traces: list[LayerTrace] = []
        self._began = self._waited = 0.0
        self._bytes = 0

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self._close()
        self._began = time.perf_counter()
        chosen = self._narrowed() if self.chosen else self.selector.first()
        self.chosen.append(chosen)
        parts = self.source.layer(layer) if self._starts else []
        assert len(parts) == len(self._starts), "a source yields every loaded part"
        self._waited = time.perf_counter() - self._began
        for start, keys, values in _joined(self._starts, parts):
            kv.place(start, keys, values)
        self._view = kv
        compares = len(chosen) and self.selector.compares(layer)
        self._stored = kv.read(chosen) if compares else None
        self._rows = torch.cat([self.layout.fresh, chosen]).sort().values
        return self._rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for index, taken in self._captured.items():
            taken.append(self._view.take(*self.layout.prompt.spans[index]))
        if self._stored is None:
            return
        local = torch.searchsorted(self._rows, self.chosen[-1]).to(keys.device)
        self._fresh = keys.index_select(1, local), values.index_select(1, local)

    def _narrowed(self) -> Tensor:
        """The rows to go on with behind the layer that has just been computed."""
        if self._stored is None or self._fresh is None:
            return self.chosen[-1]
        rows = self.selector.narrow(
            len(self.chosen) - 1, self.chosen[-1], self._fresh, self._stored
        )
        self._stored = self._fresh = None
        return rows

    def finish(self) -> tuple[LayerTrace, ...]:
        """The trace, once the walk is over."""
        self._close()
        return tuple(self._traces)

    def captured(self) -> tuple[ChunkKV, ...]:
        """KV of the chunks to capture, in the order they were asked for."""
        return tuple(
            ChunkKV(
                self.layout.prompt.chunks[index],
                tuple(k for k, _ in taken),
                tuple(v for _, v in taken),
            )
            for index, taken in self._captured.items()
        )

    def _close(self) -> None:
        """Write down the layer that has just been computed."""
        if len(self._traces) == len(self.chosen):
            return
        loaded = self.source.bytes_loaded if self._starts else 0
        trace = LayerTrace(
            rows=len(self._rows),
            charged=len(self.chosen[-1]),
            load_bytes=loaded - self._bytes,
            wait_s=self._waited,
            compute_s=time.perf_counter() - self._began - self._waited,
        )
        self._bytes = loaded
        self._traces.append(trace)


def _joined(starts: Sequence[int], parts: Sequence[KVPair]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Parts that stand next to each other as one: (first row, keys, values)."""
    at = 0
    while at < len(parts):
        end, stop = at + 1, starts[at] + parts[at][0].shape[1]
        while end < len(parts) and starts[end] == stop:
            stop += parts[end][0].shape[1]
            end += 1
        keys, values = zip(*parts[at:end], strict=True)
        yield starts[at], torch.cat(keys, 1), torch.cat(values, 1)
        at = end


def _starts(layout: Layout) -> list[int]:
    """First row of every loaded part, in the source's order."""
    spans = zip(layout.prompt.spans, layout.loaded, strict=True)
    prefix = [0] if layout.prefix_loaded and layout.prompt.prefix else []
    return prefix + [start for (start, _), here in spans if here]
