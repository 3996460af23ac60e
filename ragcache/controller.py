"""Load or compute: what to do with the stored KV of one prompt, and at what ratio.

Reading and computing overlap, so that a prompt takes as long as the longer of the two, where
computing stands still for some share of the reading. Chunks that cost more to load than to compute
are computed; whatever time is left over while the others load is spent on recomputing more of their
rows, which costs nothing then (CacheBlend's loading controller, Yao et al., EuroSys 2025,
arXiv:2405.16444: T_recompute(r) = T_load). No clock is looked at here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Any

from ragcache.types import Plan

if TYPE_CHECKING:
    from ragcache.blend.base import Blender
    from ragcache.resolve import Resolved
    from ragcache.speeds import Speeds

#: Below this ratio, no method is lossless everywhere: however fast a machine is, not less.
LEAST_RATIO = 0.15


@dataclass(frozen=True, slots=True)
class Demand:
    """A prompt in tokens, and what is stored of it in bytes; None: not there, so computed."""

    prefix: int
    chunks: tuple[int, ...]
    question: int
    prefix_bytes: int | None
    chunk_bytes: tuple[int | None, ...]
    layers: int
    floor: float = LEAST_RATIO  # the least ratio, up to 1
    full_layers: int = 0  # first layers that compute every row whatever the ratio

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.chunks) + self.question

    @property
    def stored(self) -> tuple[int, ...]:
        """Numbers of the chunks that can be loaded."""
        return tuple(i for i, size in enumerate(self.chunk_bytes) if size is not None)

    def bytes_of(self, loaded: Collection[int]) -> tuple[int, int]:
        """(parts, their bytes) that are read where these chunks, and the prefix, are loaded."""
        sizes = [self.prefix_bytes, *(self.chunk_bytes[i] for i in loaded)]
        there = [size for size in sizes if size is not None]
        return len(there), sum(there)

    def load_s(self, speeds: Speeds, loaded: Collection[int]) -> float:
        """Seconds to load these chunks, and the prefix if it is stored."""
        parts, size = self.bytes_of(loaded)
        return speeds.load_s(self.layers * parts, size)

    def compute_s(self, speeds: Speeds, loaded: Collection[int], ratio: float) -> float:
        """Seconds to compute ``ratio`` of the rows of these chunks and all rows of the rest, with
        what reading takes from it."""
        reused = sum(self.chunks[i] for i in loaded)
        placed = reused + (0 if self.prefix_bytes is None else self.prefix)
        share = (self.full_layers + (self.layers - self.full_layers) * ratio) / self.layers
        rows = self.tokens - placed + share * reused
        stolen = speeds.stolen * self.load_s(speeds, loaded)
        return speeds.compute_s(rows, self.tokens, placed) + stolen


def controls(blender: Blender) -> bool:
    """Whether a method has a ratio to be chosen, and can do without the KV of any one chunk."""
    return (
        "recompute_ratio" in blender.parameters
        and blender.behind == "compiled"
        and blender.placement == "consecutive"
    )


def demand(resolved: Resolved, blender: Blender, layers: int) -> Demand:
    """What ``blender`` would load and compute. Its own ratio is the floor if it is the higher."""
    prompt, parameters = resolved.layout.prompt, blender.parameters
    prefix, chunks = resolved.prefix, resolved.chunks
    return Demand(
        len(prompt.prefix),
        tuple(map(len, prompt.chunks)),
        len(prompt.question),
        None if prefix is None else prefix.payload_bytes,
        tuple(chunks[i].payload_bytes if i in chunks else None for i in range(len(prompt.chunks))),
        layers,
        max(LEAST_RATIO, parameters["recompute_ratio"]),
        min(layers, _full_layers(parameters)),
    )


def plan(demand: Demand, speeds: Speeds) -> Plan:
    """Which stored chunks to compute, and the ratio for the others, with the reasons."""
    instead = computed_instead(demand, speeds)
    loaded = tuple(i for i in demand.stored if i not in instead)
    ratio = free_ratio(demand, speeds, loaded)
    load, compute = demand.load_s(speeds, loaded), demand.compute_s(speeds, loaded, ratio)
    return Plan(
        ratio,
        instead,
        load,
        compute,
        speeds.token_s,
        preload(demand.layers, load, compute) + 1,
        tuple(_sentences(demand, speeds, loaded, ratio)),
    )


def preload(layers: int, load_s: float, compute_s: float) -> int:
    """L_p: so many layers must be there when the first is computed, if none is to be waited for.

    L_p = (L - 1)(1 - T_compute / T_load) + 1, and 1 where loading is the faster (Agarwal et al.,
    SIGMOD 2025, arXiv:2502.15734).
    """
    if load_s <= compute_s:
        return 1
    return ceil((layers - 1) * (1 - compute_s / load_s)) + 1


def computed_instead(demand: Demand, speeds: Speeds) -> tuple[int, ...]:
    """Numbers of the stored chunks that are computed so that the longer of loading and computing,
    at the floor, gets shorter.

    Greedy: those that save most loading per second of computing first, of equals the last first,
    since the first chunk of a prompt stands where it was computed. Never longer than to load all or
    to compute all; beyond the best set by at most l * c / (l + c), the largest over the chunks, for
    a chunk that loads in l and computes in c. For chunks of one size it is the best set.
    """
    loaded = set(demand.stored)
    load, compute = _times(demand, speeds, loaded)
    changes = []
    for chunk in demand.stored:
        without_load, without_compute = _times(demand, speeds, loaded - {chunk})
        saved, added = load - without_load, without_compute - compute
        changes.append((added / saved if saved > 0 else inf, -chunk, saved, added))
    chosen = []
    for _, negative, saved, added in sorted(changes):
        if max(load - saved, compute + added) < max(load, compute):
            load, compute = load - saved, compute + added
            chosen.append(-negative)
    return tuple(sorted(chosen))


def free_ratio(demand: Demand, speeds: Speeds, loaded: Collection[int]) -> float:
    """The largest ratio at which computing takes no longer than loading; in [floor, 1]."""
    load, least = _times(demand, speeds, loaded)
    most = demand.compute_s(speeds, loaded, 1.0)
    if load <= least or most <= least:
        return demand.floor
    return min(1.0, demand.floor + (1 - demand.floor) * (load - least) / (most - least))


def _times(demand: Demand, speeds: Speeds, loaded: Collection[int]) -> tuple[float, float]:
    """Seconds to load, and to compute at the floor."""
    return demand.load_s(speeds, loaded), demand.compute_s(speeds, loaded, demand.floor)


def _full_layers(parameters: dict[str, Any]) -> int:
    """Layers that a method computes in full before it has chosen."""
    return max(int(parameters.get("full_layers", 0)), int(parameters.get("check_layer", -1)) + 1)


def _sentences(demand: Demand, speeds: Speeds, loaded: tuple[int, ...], ratio: float) -> list[str]:
    """The choice in words. Chunks are numbered from 1, as people count."""
    every, missing = demand.stored, len(demand.chunks) - len(demand.stored)
    said = []
    if speeds.measured:
        said.append(f"Speeds as measured on {speeds.measured}; `ragcache profile` measures anew.")
    if missing:
        said.append(f"{missing} of {len(demand.chunks)} chunks are not stored: computed.")
    if not every:
        return [*said, "Nothing can be loaded, so there is no ratio to choose."]
    if len(loaded) < len(every):
        all_load, all_compute = _times(demand, speeds, every)
        instead = [i for i in every if i not in loaded]
        load, compute = _times(demand, speeds, loaded)
        said.append(
            f"{len(instead)} of {len(every)} stored chunks ({_numbers(instead)}; "
            f"{sum(demand.chunks[i] for i in instead):,} tokens) are computed and not loaded: the "
            f"longer of loading and computing falls from {_time(max(all_load, all_compute))} to "
            f"{_time(max(load, compute))}."
        )
    if not loaded:
        return [*said, "No chunk is loaded: this is full prefill, and exact."]
    return [*said, _balance(demand, speeds, loaded, ratio)]


def _balance(demand: Demand, speeds: Speeds, loaded: tuple[int, ...], ratio: float) -> str:
    """Loading against computing, and the ratio that follows."""
    parts, size = demand.bytes_of(loaded)
    load, least = _times(demand, speeds, loaded)
    rows = sum(demand.chunks[i] for i in loaded)
    if ratio == demand.floor:
        verdict = f"computing takes longer, so the ratio stays at its floor, {ratio:.2f}."
    else:
        most = _time(demand.compute_s(speeds, loaded, ratio))
        verdict = f"loading takes longer, so the ratio rises to {ratio:.2f}, which takes {most}."
    rate = f" at {size / load / 1e9:.2f} GB/s" if load else ""
    full = f", all of them in {demand.full_layers} layers," if demand.full_layers else ""
    still = f" ({_time(speeds.stolen * load)} of it standing still)" if speeds.stolen else ""
    return (
        f"Loading {size / 1e6:.1f} MB in {demand.layers * parts:,} reads{rate} takes "
        f"{_time(load)}; computing {demand.floor:.0%} of the {rows:,} loaded rows{full} and all "
        f"that are not loaded, {_time(least)}{still}: {verdict}"
    )


def _numbers(chunks: list[int]) -> str:
    return ("number " if len(chunks) == 1 else "numbers ") + ", ".join(str(i + 1) for i in chunks)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
