"""Decide which stored chunks of a prompt to load, and what share of their rows to recompute.

Loading and computing overlap, so a prompt takes as long as the longer of the two; reading also
delays computing by a measured share of its time. Where a method probes the stored KV, computing
begins when the probe has ended, and a prompt is taken to take as long as both together. Chunks that
are cheaper to compute than to load are computed. If loading the others still takes longer than
computing beside it, the ratio is raised until both take equally long, which costs no time
(CacheBlend's loading controller, Yao et al., EuroSys 2025, arXiv:2405.16444: T_recompute(r) =
T_load). Everything follows from measured speeds; this module reads no clock.

A remote store may hold a chunk in several *alternatives*: the record itself, and records of other
codecs, which are smaller and lose more (CacheGen, Liu et al., SIGCOMM 2024, arXiv:2310.07240; its
controller chooses between encodings and the text, which means here that the chunk is computed).
The link transfers while this machine reads and decodes, so loading takes as long as the longer of
the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING

from ragcache.blend import with_ratio
from ragcache.store.base import StoredChunk
from ragcache.types import Plan

if TYPE_CHECKING:
    from ragcache.blend.base import Blender
    from ragcache.planning.cost_model import Speeds
    from ragcache.planning.lookup import PromptLookup

__all__ = ["controls", "plan", "prefill_cost"]

#: The lowest ratio that is chosen without a calibration, however fast the machine loads: with a
#: lower one, no method keeps its quality on all kinds of questions (docs/choosing-tokens.md).
_MIN_RATIO = 0.15
#: Largest share of a prompt's time that loading may take when a less lossy alternative is chosen.
#: It leaves a margin for a link that is slower than measured: a late layer delays all later ones.
_MAX_LOAD_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Alternative:
    """A stored record that a chunk's KV can be loaded from."""

    size: int  # bytes as stored
    codec: str = ""  # empty: the store's own
    is_remote: bool = False

    @classmethod
    def of(cls, stored: StoredChunk, *, remote_codec: bool = False) -> Alternative:
        """``remote_codec``: the record has another codec than the store's own."""
        return cls(stored.payload_bytes, stored.codec if remote_codec else "", stored.is_remote)


_Loaded = Mapping[int, Alternative]  # chunk number -> the record it is loaded from


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """The time to load and to compute one prompt, as a function of which chunks are loaded.

    Lengths are in tokens, times in seconds. A chunk without alternatives is not stored and has to
    be computed; stored texts are always loaded.
    """

    texts: int  # those that are loaded
    chunks: tuple[int, ...]
    computed: int  # all other texts
    text_records: tuple[Alternative, ...]  # of the loaded texts
    alternatives: tuple[tuple[Alternative, ...], ...]  # of each chunk, the least lossy first
    layers: int
    floor: float = _MIN_RATIO  # the lowest ratio that may be chosen, up to 1
    full_layers: int = 0  # first layers that compute every row whatever the ratio
    probed: float = 0.0  # rows that a probe of the loaded chunks computes, mean over all layers
    repeated: int = 0  # rows of the question that are computed again

    @property
    def tokens(self) -> int:
        return self.texts + sum(self.chunks) + self.computed

    @property
    def stored(self) -> tuple[int, ...]:
        """The numbers of the chunks that can be loaded."""
        return tuple(i for i, records in enumerate(self.alternatives) if records)

    def read(self, loaded: _Loaded) -> tuple[Alternative, ...]:
        """The records to read for the stored texts and the chunks ``loaded``."""
        return (*self.text_records, *loaded.values())

    def link_s(self, speeds: Speeds, loaded: _Loaded) -> float:
        """Seconds for the link to transfer those of these records that are remote."""
        sizes = [record.size for record in self.read(loaded) if record.is_remote]
        if speeds.link is None or not sizes:
            return 0.0
        return speeds.link.seconds(self.layers * len(sizes), sum(sizes))

    def read_s(self, speeds: Speeds, loaded: _Loaded) -> float:
        """Seconds for this machine to read, check and decode these records."""
        records = self.read(loaded)
        decoding = sum(speeds.decode_s.get(each.codec, 0.0) * each.size for each in records)
        size = sum(each.size for each in records)
        return speeds.load_s(self.layers * len(records), size) + decoding

    def load_s(self, speeds: Speeds, loaded: _Loaded) -> float:
        """Seconds to load these chunks, and the stored texts."""
        return max(self.link_s(speeds, loaded), self.read_s(speeds, loaded))

    def compute_s(self, speeds: Speeds, loaded: _Loaded, ratio: float) -> float:
        """Seconds to compute ``ratio`` of the rows of these chunks and all rows of the others,
        including the delay that reading causes."""
        reused = sum(self.chunks[i] for i in loaded)
        placed = reused + self.texts
        share = (self.full_layers + (self.layers - self.full_layers) * ratio) / self.layers
        rows = self.tokens - placed + share * reused
        rows += self.probed + self.repeated if loaded else 0
        delay = speeds.overlap_penalty * self.read_s(speeds, loaded)
        return speeds.compute_s(rows, self.tokens, placed) + delay


def controls(blender: Blender) -> bool:
    """Whether the controller can plan for a method: the method takes a ratio, and any chunk that it
    would load may be computed instead."""
    return (
        blender.ratio is not None
        and blender.reuses == "encoded"
        and blender.placement == "consecutive"
    )


def prefill_cost(
    found: PromptLookup,
    blender: Blender,
    layers: int,
    remote_codecs: Mapping[int, Sequence[StoredChunk]] | None = None,
    *,
    is_calibrated: bool = False,
) -> PrefillCost:
    """The cost of a prompt under ``blender``, which the controller :func:`controls`, in a model of
    ``layers`` layers. The floor is the blender's own ratio, or ``_MIN_RATIO`` if that is higher and
    the ratio was not calibrated.

    ``remote_codecs``: by chunk number, records of other codecs that may be loaded instead.
    """
    layout, others = found.layout, remote_codecs or {}
    floor = max(0.0 if is_calibrated else _MIN_RATIO, blender.ratio or 0.0)
    selector = with_ratio(blender, floor).selector(layout, layers)
    probe = selector.probe if len(layout.reusable) else None
    lengths = tuple(map(len, layout.prompt.chunks))
    texts = len(layout.loaded_text_rows)
    return PrefillCost(
        texts,
        lengths,
        len(layout.prompt) - sum(lengths) - texts,
        tuple(map(Alternative.of, found.texts)),
        tuple(_alternatives(found.chunks.get(i), others.get(i, ())) for i in range(len(lengths))),
        layers,
        floor,
        min(layers, blender.full_layers),
        0.0 if probe is None else len(layout.probing) * probe.layers / layers,
        0 if selector.repair is None else selector.repair.asking,
    )


def plan(cost: PrefillCost, speeds: Speeds) -> Plan:
    """Which stored chunks to compute, which records to load the others from, and at what ratio,
    with the reasons in sentences."""
    loaded = _choose(cost, speeds)
    instead = tuple(i for i in cost.stored if i not in loaded)
    ratio = _free_ratio(cost, speeds, loaded)
    load, compute = cost.load_s(speeds, loaded), cost.compute_s(speeds, loaded, ratio)
    return Plan(
        ratio,
        instead,
        load,
        compute,
        speeds.token_s,
        _preload(cost.layers, load, compute) + 1,
        tuple(_sentences(cost, speeds, loaded, ratio)),
        {i: cost.alternatives[i].index(each) for i, each in loaded.items() if each.codec},
        overlap=not (cost.probed and loaded),
    )


def _preload(layers: int, load_s: float, compute_s: float) -> int:
    """L_p: the layers to load before the first is computed, so that computing never waits.

    L_p = (L - 1)(1 - T_compute / T_load) + 1, rounded up, and 1 if loading is not slower (Agarwal
    et al., SIGMOD 2025, arXiv:2502.15734).
    """
    if load_s <= compute_s:
        return 1
    return ceil((layers - 1) * (1 - compute_s / load_s)) + 1


def _choose(cost: PrefillCost, speeds: Speeds) -> _Loaded:
    """The records to load: first make the longer of loading and computing (at the floor) short,
    then take the least lossy alternatives that do not make it longer.

    The search starts from the fastest alternatives, and from each alternative for all chunks
    alike, so the result is never slower than loading all chunks in one codec.
    """
    starts = [_fastest(cost, speeds)]
    for level in range(max(map(len, cost.alternatives), default=0)):
        records = {i: cost.alternatives[i] for i in cost.stored}
        alike = {i: each[min(level, len(each) - 1)] for i, each in records.items()}
        starts += [alike] if alike not in starts else []
    found = [_without_costly(cost, speeds, start) for start in starts]
    return _least_lossy(cost, speeds, min(found, key=lambda one: _total(cost, speeds, one)))


def _fastest(cost: PrefillCost, speeds: Speeds) -> _Loaded:
    """All stored chunks, with alternatives that make loading all of them fast.

    Small records are fast where the link is the bottleneck, and slow where decoding is. So this
    begins with the alternative that is fastest for each chunk alone, and replaces them one by one
    if that shortens the time to load all chunks.
    """

    def alone(record: Alternative) -> float:
        return cost.load_s(speeds, {0: record})

    loaded = {i: min(cost.alternatives[i], key=alone) for i in cost.stored}
    best = cost.load_s(speeds, loaded)
    for i in loaded:
        for record in cost.alternatives[i]:
            changed = {**loaded, i: record}
            if (load := cost.load_s(speeds, changed)) < best:
                loaded, best = changed, load
    return loaded


def _without_costly(cost: PrefillCost, speeds: Speeds, every: _Loaded) -> _Loaded:
    """``every`` without the chunks that are cheaper to compute than to load: without them, the
    longer of loading and computing (at the floor) is shorter.

    Greedy, by the loading time saved per second of computing added; among equal chunks the last
    first, since the first chunk of a prompt may be exact when it is loaded. Never slower than
    loading all or computing all. If nothing is remote, slower than the best set by at most the
    largest l * c / (l + c) over the chunks, for a chunk that takes l to load and c to compute; for
    chunks of one size it is the best set.
    """
    load, compute = _times(cost, speeds, every)
    changes = []
    for chunk in every:
        without_load, without_compute = _times(cost, speeds, _without(every, chunk))
        saved, added = load - without_load, without_compute - compute
        changes.append((added / saved if saved > 0 else inf, -chunk))
    loaded, best = every, _total(cost, speeds, every)
    for _, negative in sorted(changes):
        fewer = _without(loaded, -negative)
        if (time := _total(cost, speeds, fewer)) < best:
            loaded, best = fewer, time
    nothing: _Loaded = {}
    return nothing if _total(cost, speeds, nothing) < best else loaded


def _least_lossy(cost: PrefillCost, speeds: Speeds, loaded: _Loaded) -> _Loaded:
    """The same chunks, each with the least lossy alternative that neither makes the prompt slower
    nor makes loading take more than :data:`_MAX_LOAD_SHARE` of its time. Chunks are considered in
    prompt order."""
    limit = _total(cost, speeds, loaded)
    for i, record in loaded.items():
        for better in cost.alternatives[i][: cost.alternatives[i].index(record)]:
            changed = {**loaded, i: better}
            load = cost.load_s(speeds, changed)
            if _total(cost, speeds, changed) <= limit and load <= _MAX_LOAD_SHARE * limit:
                loaded = changed
                break
    return loaded


def _free_ratio(cost: PrefillCost, speeds: Speeds, loaded: _Loaded) -> float:
    """The highest ratio at which computing takes no longer than loading; in [floor, 1]."""
    if cost.probed:
        return cost.floor
    load, least = _times(cost, speeds, loaded)
    most = cost.compute_s(speeds, loaded, 1.0)
    if load <= least or most <= least:
        return cost.floor
    return min(1.0, cost.floor + (1 - cost.floor) * (load - least) / (most - least))


def _times(cost: PrefillCost, speeds: Speeds, loaded: _Loaded) -> tuple[float, float]:
    """Seconds to load, and to compute at the floor."""
    return cost.load_s(speeds, loaded), cost.compute_s(speeds, loaded, cost.floor)


def _total(cost: PrefillCost, speeds: Speeds, loaded: _Loaded) -> float:
    """The seconds of the prompt, computed at the floor."""
    load, compute = _times(cost, speeds, loaded)
    return load + compute if cost.probed and loaded else max(load, compute)


def _without(loaded: _Loaded, chunk: int) -> _Loaded:
    return {i: record for i, record in loaded.items() if i != chunk}


def _alternatives(
    stored: StoredChunk | None, others: Sequence[StoredChunk]
) -> tuple[Alternative, ...]:
    if stored is None:
        return ()
    return Alternative.of(stored), *(Alternative.of(other, remote_codec=True) for other in others)


def _sentences(cost: PrefillCost, speeds: Speeds, loaded: _Loaded, ratio: float) -> list[str]:
    """The choice and its reasons in sentences, for reports. Chunks are numbered from 1."""
    every, missing = (
        _fastest(cost, speeds),
        len(cost.chunks) - len(cost.stored),
    )
    said = []
    if speeds.measured:
        said.append(f"Speeds as measured on {speeds.measured}; `ragcache profile` measures anew.")
    if missing:
        said.append(f"{missing} of {len(cost.chunks)} chunks are not stored: computed.")
    if not every:
        return [*said, "Nothing can be loaded, so there is no ratio to choose."]
    if len(loaded) < len(every):
        instead = [i for i in every if i not in loaded]
        said.append(
            f"{len(instead)} of {len(every)} stored chunks ({_numbers(instead)}; "
            f"{sum(cost.chunks[i] for i in instead):,} tokens) are computed and not loaded: "
            f"{'the sum' if cost.probed else 'the longer'} of loading and computing falls from "
            f"{_time(_total(cost, speeds, every))} to {_time(_total(cost, speeds, loaded))}."
        )
    for codec, count in Counter(record.codec for record in loaded.values() if record.codec).items():
        said.append(f"{count} of {len(loaded)} are loaded as {codec}, which takes fewer bytes.")
    if not loaded:
        return [*said, "No chunk is loaded: this is full prefill, and exact."]
    return [*said, _balance(cost, speeds, loaded, ratio)]


def _balance(cost: PrefillCost, speeds: Speeds, loaded: _Loaded, ratio: float) -> str:
    """The times of loading and computing, and the ratio that follows, as a sentence."""
    records = cost.read(loaded)
    parts, size = len(records), sum(record.size for record in records)
    load, least = _times(cost, speeds, loaded)
    rows = sum(cost.chunks[i] for i in loaded)
    if cost.probed:
        verdict = (
            "the probe of the question needs all that is loaded, so computing more would take "
            f"longer, and the ratio stays at its floor, {ratio:.2f}."
        )
    elif ratio == cost.floor:
        verdict = f"computing takes longer, so the ratio stays at its floor, {ratio:.2f}."
    else:
        most = _time(cost.compute_s(speeds, loaded, ratio))
        verdict = f"loading takes longer, so the ratio rises to {ratio:.2f}, which takes {most}."
    rate = f" at {size / load / 1e9:.2f} GB/s" if load else ""
    full = f", all of them in {cost.full_layers} layers," if cost.full_layers else ""
    read = cost.read_s(speeds, loaded)
    penalty = speeds.overlap_penalty
    delay = f" ({_time(penalty * read)} of it waiting for reads)" if penalty else ""
    far = sum(record.is_remote for record in records)
    where = f" ({far} of {parts} parts over the link)" if far else ""
    return (
        f"Loading {size / 1e6:.1f} MB in {cost.layers * parts:,} reads{rate}{where} takes "
        f"{_time(load)}; computing {cost.floor:.0%} of the {rows:,} loaded rows{full} and all "
        f"that are not loaded, {_time(least)}{delay}: {verdict}"
    )


def _numbers(chunks: list[int]) -> str:
    return ("number " if len(chunks) == 1 else "numbers ") + ", ".join(str(i + 1) for i in chunks)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
