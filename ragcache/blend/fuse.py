"""Fused prefill: one pass over the layers that places stored KV and computes the chosen rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ragcache.blend.base import Blender, KVSource, Layout, Probe, Selector
from ragcache.blend.context_attention import ContextAttention
from ragcache.engine.base import ComputeRows, PrefillCallbacks
from ragcache.errors import ConfigError, PromptError
from ragcache.types import ChunkKV, ChunkNotes, KVPair, LayerLoad, LayerTrace

if TYPE_CHECKING:
    from ragcache.engine.base import LayerView, Prefilled, Prefiller, Repair

__all__ = ["FusedPrompt", "fuse"]


@dataclass(frozen=True, slots=True)
class FusedPrompt:
    """A prefilled prompt, ready to decode, with a record of what was loaded and computed."""

    prefilled: Prefilled
    layout: Layout
    layers: tuple[LayerTrace, ...]
    chosen: tuple[Tensor, ...]  # per layer, the reusable rows that were computed
    computed: Tensor  # (rows of the prompt,), int64: at how many layers each was computed
    captured: tuple[ChunkKV, ...] = ()  # of the chunks in ``capture``
    captured_texts: tuple[ChunkKV, ...] = ()  # of the texts in ``capture_texts``
    notes: tuple[ChunkNotes, ...] = ()  # on the same chunks, if the method reuses variants
    probed: int = 0  # rows computed by a probe, summed over its layers
    repair: Repair | None = None  # the method's, with all rows that it has chosen up to now
    repair_s: float = 0.0  # seconds to compute those that it chose before the first token

    @property
    def late(self) -> Tensor:
        """The reusable rows that were computed late, at every layer, up to now; sorted int64."""
        late = [] if self.repair is None else self.repair.rows
        return torch.cat([*late, torch.empty(0, dtype=torch.int64)]).sort().values

    @property
    def recomputed(self) -> tuple[Tensor, ...]:
        """Per layer, the reusable rows that were computed, up to now; sorted int64."""
        late = self.late
        more = (late[~torch.isin(late, rows)] for rows in self.chosen)
        each = zip(self.chosen, more, strict=True)
        return tuple(torch.cat(both).sort().values for both in each)

    @property
    def again(self) -> int:
        """Rows that were computed besides, by a probe or for a second time, summed over layers."""
        return self._rows - sum(map(len, self.recomputed))

    @property
    def _rows(self) -> int:
        """All rows that were computed to choose or to replace loaded ones, summed over layers."""
        again = 0 if self.repair is None else self.repair.again
        late = (len(self.late) + again) * len(self.chosen)
        return sum(map(len, self.chosen)) + self.probed + late

    @property
    def charged_budget(self) -> float:
        """(sum_l |A_l & reusable| + again) / (L * reusable); 1 where nothing was reusable."""
        reusable = len(self.layout.reusable) + self.layout.kept_chunk_rows
        if reusable == 0:
            return 1.0
        return self._rows / (len(self.chosen) * reusable)


def fuse(
    engine: Prefiller,
    blender: Blender,
    layout: Layout,
    source: KVSource,
    *,
    room: int = 1,
    capture: Sequence[int] = (),
    capture_texts: Sequence[int] = (),
    check: Callable[[], None] | None = None,
    kept: Prefilled | None = None,
) -> FusedPrompt:
    """Prefill ``layout.prompt`` with the stored KV of ``source`` under ``blender``.

    ``source`` yields the loaded parts in prompt order. Rows whose KV is not loaded are computed at
    every layer. ``room``: rows to reserve for decoding. ``capture``: numbers of chunks that are not
    loaded and whose KV is returned as computed in this prompt, with notes on their attention if the
    method reuses variants. ``capture_texts``: the same for texts, without notes.
    ``check`` is called before every layer; an exception that it raises ends the prefill. ``kept``:
    an earlier prompt, which has the first ``layout.kept`` rows. Raises
    StoreError if ``source`` cannot read a layer, ConfigError if the method needs attention weights
    but the engine does not expose them, and PromptError if the last part is loaded.
    """
    began, prompt = time.perf_counter(), layout.prompt
    layers, tokens, positions = engine.spec.layers, prompt.tokens, layout.positions
    if layout.loaded_spans and layout.loaded_spans[-1][1] == len(prompt):
        raise PromptError("the prompt ends with a chunk whose KV is loaded: end it with a text")
    before = None if kept is None else (kept, layout.kept)
    layout = replace(layout, repairs=engine.repairs)
    selector = blender.selector(layout, layers)
    probe = selector.probe if len(layout.reusable) else None
    attend, repair = selector.attend, selector.repair if len(layout.reusable) else None
    noted = (
        ContextAttention(layout, capture, attend)
        if capture and blender.reuses == "variant"
        else None
    )
    looks = probe or attend or repair or blender.reuses == "variant"
    if looks and not engine.exposes_attention:
        raise ConfigError(
            f"mode {blender.mode} looks at attention weights, which {engine.name} does not show. "
            "Use fused:attention=0, cacheblend, reuse or full."
        )
    source.start([layer for layer in range(layers) if selector.loads(layer)])
    placed, layers_placed = None, 0
    if probe is not None:
        reads = noted or attend or any(map(selector.compares, range(layers)))
        once = not reads and len(layout.probed) == len(prompt)  # what is placed stays in place
        source = source if once else _ReplaySource(source)
        kv = _run_probe(engine, probe, layout, source, check, room, before)
        if once:
            placed, layers_placed = kv, probe.layers
    spans = [prompt.spans[i] for i in capture] + [prompt.text_spans[i] for i in capture_texts]
    callbacks = FusionCallbacks(
        selector, layout, source, spans, check, placed=layers_placed, began=began
    )
    prefilled = engine.prefill(
        tokens,
        callbacks,
        positions=positions,
        room=room,
        attend=noted or attend or (None if repair is None else repair.see),
        kept=before,
        placed=placed,
    )
    traces, repair_s = callbacks.finish(), 0.0
    if repair is not None:
        began = time.perf_counter()
        prefilled = _repaired(engine, repair, layout, prefilled, room)
        if repair.rows:
            repair_s = time.perf_counter() - began
    if not selector.lasting:
        prefilled = replace(prefilled, attend=None)
    captured = callbacks.captured()
    return FusedPrompt(
        prefilled,
        layout,
        traces,
        tuple(callbacks.chosen),
        callbacks.computed,
        captured[: len(capture)],
        captured[len(capture) :],
        tuple(map(noted.notes, capture)) if noted is not None else (),
        len(layout.probing) * probe.layers if probe is not None else 0,
        repair,
        repair_s,
    )


def _repaired(
    engine: Prefiller, repair: Repair, layout: Layout, prefilled: Prefilled, room: int
) -> Prefilled:
    """``prefilled`` with the rows that matter to its question computed. Those that matter to its
    answer are left to the engine, if it decodes with repairs."""
    rows = repair.take()
    if len(rows):
        ending = torch.arange(len(layout.prompt) - layout.ending, len(layout.prompt))
        prefilled = engine.prefill(
            layout.prompt.tokens,
            ComputeRows(torch.cat([rows, ending])),
            positions=layout.positions,
            room=room,
            placed=prefilled.kv,
        )
    return replace(prefilled, repair=repair if engine.repairs else None)


def _run_probe(
    engine: Prefiller,
    probe: Probe,
    layout: Layout,
    source: KVSource,
    check: Callable[[], None] | None,
    room: int,
    kept: tuple[Prefilled, int] | None,
) -> Any:
    """Run ``probe`` on the rows ``layout.probed`` of the prompt, at their positions in it. Returns
    their KV."""
    rows, tokens, positions = layout.probed.tolist(), layout.prompt.tokens, layout.positions
    return engine.probe(
        tuple(tokens[row] for row in rows),
        _ProbeCallbacks(layout, source, check),
        probe.see,
        positions=[positions[row] for row in rows],
        layers=probe.layers,
        room=room,
        kept=kept,
    )


class _ProbeCallbacks(PrefillCallbacks):
    """Places the loaded parts among the rows of a probe, and computes the others."""

    def __init__(self, layout: Layout, source: KVSource, check: Callable[[], None] | None) -> None:
        self.source, self._check = source, check
        firsts = torch.tensor([first for first, _ in layout.loaded_spans])
        moved = zip(layout.in_probe(firsts).tolist(), layout.loaded_spans, strict=True)
        spans = [(start, start + stop - first) for start, (first, stop) in moved]
        self._parts = _LoadedParts(spans)
        self._computed = layout.in_probe(layout.probing)

    def before(self, layer: int, kv: LayerView) -> Tensor:
        if self._check is not None:
            self._check()
        self._parts.place(kv, self.source.layer(layer))
        return self._computed


class _ReplaySource:
    """A KVSource that keeps what it has read, so that it can be read again after a probe."""

    def __init__(self, source: KVSource) -> None:
        self.source = source
        self._layers: list[list[KVPair]] = []

    def start(self, layers: Sequence[int]) -> None:
        raise NotImplementedError("the source has been started")

    def load(self, layer: int) -> LayerLoad:
        return self.source.load(layer)

    def layer(self, layer: int) -> list[KVPair]:
        if layer == len(self._layers):
            self._layers.append(self.source.layer(layer))
        return self._layers[layer]


class FusionCallbacks(PrefillCallbacks):
    """The callbacks of one fused prefill. At layer l it computes ``fresh | chosen_l``. The loaded
    parts of the first ``placed`` layers are in place. Times count from ``began``, or from now."""

    def __init__(
        self,
        selector: Selector,
        layout: Layout,
        source: KVSource,
        capture: Sequence[tuple[int, int]] = (),
        check: Callable[[], None] | None = None,
        *,
        placed: int = 0,
        began: float | None = None,
    ) -> None:
        self.selector, self.layout, self.source = selector, layout, source
        self._check, self._placed = check, placed
        self._capture = capture
        self._captured: list[list[KVPair]] = [[] for _ in capture]  # per span of rows, per layer
        self.chosen: list[Tensor] = []
        #: How many layers have computed each row; complete after :meth:`finish`.
        self.computed = torch.zeros(len(layout.prompt), dtype=torch.int64)
        self._parts = _LoadedParts(layout.loaded_spans)
        self._left: Tensor | None = None  # of the chosen rows, where the layer has narrowed
        self._stored: KVPair | None = None  # of the chosen rows, kept where they are compared
        self._fresh: KVPair | None = None  # the same rows as computed
        self._rows = torch.empty(0, dtype=torch.int64)  # that the layer computes
        self._loads = True  # whether it loads
        self._uncounted = 0  # layers that have computed these rows, which ``computed`` lacks
        self._traces: list[LayerTrace] = []
        self._began = time.perf_counter() if began is None else began
        self._times = (0.0, 0.0, 0.0)  # since then: at the layer, loaded, placed

    def before(self, layer: int, kv: LayerView) -> Tensor:
        if self._check is not None:
            self._check()
        self._close()
        if not self.chosen:
            chosen = self.selector.first()
        elif self._left is not None:
            chosen, self._left = self._left, None
        elif self.selector.narrows(layer - 1):
            chosen = self._narrow(layer - 1)
        else:
            chosen = self.chosen[-1]
        at = self._now()
        self.chosen.append(chosen)
        loads = self.selector.loads(layer)
        needed = self._parts.spans and loads and layer >= self._placed
        parts = self.source.layer(layer) if needed else []
        loaded = self._now()
        if parts:
            self._parts.place(kv, parts)
        self._view = kv
        compares = len(chosen) and self.selector.compares(layer)
        self._stored = kv.read(chosen) if compares else None
        same = len(self.chosen) > 1 and chosen is self.chosen[-2] and loads == self._loads
        if not same:  # most layers compute the rows of the layer before
            self._count()
            self._rows, self._loads = self._with_fresh(chosen), loads
            if not loads:
                self._rows = torch.cat([self.layout.loaded_text_rows, self._rows]).sort().values
        self._uncounted += 1
        self._times = at, loaded, self._now()
        return self._rows

    def narrows(self, layer: int) -> bool:
        return self.selector.attend is None and self.selector.narrows(layer)

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for span, taken in zip(self._capture, self._captured, strict=True):
            taken.append(self._view.take(*span))
        if self._stored is None:
            return
        local = torch.searchsorted(self._rows, self.chosen[-1]).to(keys.device)
        self._fresh = keys.index_select(1, local), values.index_select(1, local)

    def narrowed(self, layer: int) -> Tensor:
        self._left = self._narrow(layer)
        return self._with_fresh(self._left)

    def _with_fresh(self, chosen: Tensor) -> Tensor:
        return torch.cat([self.layout.fresh, chosen]).sort().values

    def _narrow(self, layer: int) -> Tensor:
        """The rows to continue with, of those chosen at ``layer``, which is the current layer."""
        rows = self.chosen[-1]
        if len(rows):
            rows = self.selector.narrow(layer, rows, self._fresh, self._stored)
        self._stored = self._fresh = None
        return rows

    def finish(self) -> tuple[LayerTrace, ...]:
        """The trace of all layers; to be called after the last one."""
        self._close()
        self._count()
        return tuple(self._traces)

    def _count(self) -> None:
        """Add the layers that have computed the present rows to ``computed``."""
        self.computed[self._rows] += self._uncounted
        self._uncounted = 0

    def captured(self) -> tuple[ChunkKV, ...]:
        """KV of the captured rows, in the order of ``capture``."""
        tokens = self.layout.prompt.tokens
        return tuple(
            ChunkKV(tokens[start:stop], tuple(k for k, _ in taken), tuple(v for _, v in taken))
            for (start, stop), taken in zip(self._capture, self._captured, strict=True)
        )

    def _close(self) -> None:
        """Add the layer that has just been computed to the trace."""
        layer = len(self._traces)
        if layer == len(self.chosen):
            return
        needed = self._parts.spans and self.selector.loads(layer)
        load = self.source.load(layer) if needed else LayerLoad(0, self._began, self._began)
        at, loaded, placed = self._times
        trace = LayerTrace(
            rows=len(self._rows),
            through=len(self._rows)
            if self._left is None
            else len(self.layout.fresh) + len(self._left),
            charged=len(self.chosen[-1]),
            load_bytes=load.bytes,
            read_at_s=load.began - self._began,
            read_s=load.ended - load.began,
            at_s=at,
            wait_s=loaded - at,
            place_s=placed - loaded,
            compute_s=self._now() - placed,
        )
        self._traces.append(trace)

    def _now(self) -> float:
        return time.perf_counter() - self._began


class _LoadedParts:
    """Where the parts of a source stand."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = spans
        self._runs = _runs(spans)
        self._sizes = [stop - start for start, stop in spans]

    def place(self, kv: LayerView, parts: Sequence[KVPair]) -> None:
        """Write one layer of all parts, of each the rows of its span."""
        used = [_first_rows(pair, n) for pair, n in zip(parts, self._sizes, strict=True)]
        for start, run in self._runs:
            kv.place(start, used[run])


def _runs(spans: Sequence[tuple[int, int]]) -> list[tuple[int, slice]]:
    """Runs of adjacent parts: the first row, and the slice of the source's parts."""
    runs: list[tuple[int, slice]] = []
    end = -1
    for number, (start, stop) in enumerate(spans):
        if start == end:
            first, run = runs[-1]
            runs[-1] = first, slice(run.start, number + 1)
        else:
            runs.append((start, slice(number, number + 1)))
        end = stop
    return runs


def _first_rows(pair: KVPair, rows: int) -> KVPair:
    keys, values = pair
    return pair if keys.shape[1] == rows else (keys[:, :rows], values[:, :rows])
