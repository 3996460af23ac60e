"""Load or compute: what to do with the stored KV of one prompt, and at what ratio.

Reading and computing overlap, so that a prompt takes as long as the longer of the two, where
computing stands still for some share of the reading. Chunks that cost more to load than to compute
are computed; whatever time is left over while the others load is spent on recomputing more of their
rows, which costs nothing then (CacheBlend's loading controller, Yao et al., EuroSys 2025,
arXiv:2405.16444: T_recompute(r) = T_load). No clock is looked at here.

A chunk that comes over a network may be there in several *forms*: as it is, and at levels that take
fewer bytes and lose more (CacheGen, Liu et al., SIGCOMM 2024, arXiv:2310.07240, whose controller
chooses among levels and text; here, text is to compute). Then loading is two things that go on side
by side, and takes as long as the longer: what the link transfers, and what this machine reads and
decodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Any

from ragcache.store.base import StoredChunk
from ragcache.types import Plan

if TYPE_CHECKING:
    from ragcache.blend.base import Blender
    from ragcache.planning.cost_model import Speeds
    from ragcache.planning.lookup import PromptLookup

#: The least ratio that is chosen, however fast a machine is: below it, no method keeps its answers
#: everywhere.
LEAST_RATIO = 0.15
#: Share of a prompt's time that loading may take for the sake of better forms: no link is as steady
#: as it was measured, and a layer that is late delays all behind it.
MOST_LOAD = 0.8


@dataclass(frozen=True, slots=True)
class Form:
    """A record that the KV of a chunk can be loaded from."""

    size: int  # bytes, as it is stored
    codec: str = ""  # empty: the store's own
    is_remote: bool = False

    @classmethod
    def of(cls, stored: StoredChunk, *, level: bool = False) -> Form:
        return cls(stored.payload_bytes, stored.codec if level else "", stored.is_remote)


Loaded = Mapping[int, Form]  # chunks by number, and what they are loaded from


@dataclass(frozen=True, slots=True)
class Demand:
    """The sizes of a prompt's parts in tokens, and what is stored of each. A part without a form is
    not stored, and is computed."""

    prefix: int
    chunks: tuple[int, ...]
    question: int
    prefix_form: Form | None
    forms: tuple[tuple[Form, ...], ...]  # of each chunk, those that lose least first
    layers: int
    floor: float = LEAST_RATIO  # the least ratio, up to 1
    full_layers: int = 0  # first layers that compute every row whatever the ratio

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.chunks) + self.question

    @property
    def stored(self) -> tuple[int, ...]:
        """Numbers of the chunks that can be loaded."""
        return tuple(i for i, forms in enumerate(self.forms) if forms)

    def read(self, loaded: Loaded) -> tuple[Form, ...]:
        """What is read where these chunks, and the prefix if it is stored, are loaded."""
        return (*(() if self.prefix_form is None else (self.prefix_form,)), *loaded.values())

    def link_s(self, speeds: Speeds, loaded: Loaded) -> float:
        """Seconds for the link to transfer what is remote of it."""
        remote = [form.size for form in self.read(loaded) if form.is_remote]
        if speeds.link is None or not remote:
            return 0.0
        return speeds.link.seconds(self.layers * len(remote), sum(remote))

    def read_s(self, speeds: Speeds, loaded: Loaded) -> float:
        """Seconds for this machine to read, check and decode it."""
        forms = self.read(loaded)
        decoding = sum(speeds.decode_s.get(form.codec, 0.0) * form.size for form in forms)
        return speeds.load_s(self.layers * len(forms), sum(f.size for f in forms)) + decoding

    def load_s(self, speeds: Speeds, loaded: Loaded) -> float:
        """Seconds to load these chunks, and the prefix if it is stored."""
        return max(self.link_s(speeds, loaded), self.read_s(speeds, loaded))

    def compute_s(self, speeds: Speeds, loaded: Loaded, ratio: float) -> float:
        """Seconds to compute ``ratio`` of the rows of these chunks and all rows of the rest, with
        what reading takes from it."""
        reused = sum(self.chunks[i] for i in loaded)
        placed = reused + (0 if self.prefix_form is None else self.prefix)
        share = (self.full_layers + (self.layers - self.full_layers) * ratio) / self.layers
        rows = self.tokens - placed + share * reused
        stolen = speeds.stolen * self.read_s(speeds, loaded)
        return speeds.compute_s(rows, self.tokens, placed) + stolen


def controls(blender: Blender) -> bool:
    """Whether a method has a ratio to be chosen, and can do without the KV of any one chunk."""
    return (
        "recompute_ratio" in blender.parameters
        and blender.behind == "compiled"
        and blender.placement == "consecutive"
    )


def demand(
    found: PromptLookup,
    blender: Blender,
    layers: int,
    levels: Mapping[int, Sequence[StoredChunk]] | None = None,
) -> Demand:
    """What ``blender`` would load and compute. Its own ratio is the floor if it is the higher.

    ``levels``: by number of the chunk, other records that may be loaded in its place.
    """
    prompt, parameters = found.layout.prompt, blender.parameters
    prefix, chunks = found.prefix, found.chunks
    return Demand(
        len(prompt.prefix),
        tuple(map(len, prompt.chunks)),
        len(prompt.question),
        None if prefix is None else Form.of(prefix),
        tuple(_forms(chunks.get(i), (levels or {}).get(i, ())) for i in range(len(prompt.chunks))),
        layers,
        max(LEAST_RATIO, parameters["recompute_ratio"]),
        min(layers, _full_layers(parameters)),
    )


def plan(demand: Demand, speeds: Speeds) -> Plan:
    """Which stored chunks to compute, what to load the others from, and the ratio for these, with
    the reasons."""
    loaded = chosen(demand, speeds)
    instead = tuple(i for i in demand.stored if i not in loaded)
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
        {i: demand.forms[i].index(form) for i, form in loaded.items() if form.codec},
    )


def preload(layers: int, load_s: float, compute_s: float) -> int:
    """L_p: so many layers must be there when the first is computed, if none is to be waited for.

    L_p = (L - 1)(1 - T_compute / T_load) + 1, and 1 where loading is the faster (Agarwal et al.,
    SIGMOD 2025, arXiv:2502.15734).
    """
    if load_s <= compute_s:
        return 1
    return ceil((layers - 1) * (1 - compute_s / load_s)) + 1


def chosen(demand: Demand, speeds: Speeds) -> Loaded:
    """What to load: so that the longer of loading and computing, at the floor, is short; and of
    what takes no longer than that, the forms that lose least."""
    begun = [fastest(demand, speeds)]
    for level in range(max(map(len, demand.forms), default=0)):  # none of them is to be better
        alike = {i: demand.forms[i][min(level, len(demand.forms[i]) - 1)] for i in demand.stored}
        begun += [alike] if alike not in begun else []
    found = [without_dearest(demand, speeds, one) for one in begun]
    return bettered(demand, speeds, min(found, key=lambda one: max(_times(demand, speeds, one))))


def fastest(demand: Demand, speeds: Speeds) -> Loaded:
    """Of every chunk the form that loads in the shortest time.

    Small forms are fast where the link is the bottleneck, and slow where decoding is. So this
    begins with the form that is fastest for each chunk alone, and changes one chunk after another
    where that makes the whole load faster.
    """

    def alone(form: Form) -> float:
        return demand.load_s(speeds, {0: form})

    loaded = {i: min(demand.forms[i], key=alone) for i in demand.stored}
    best = demand.load_s(speeds, loaded)
    for i in loaded:
        for form in demand.forms[i]:
            changed = {**loaded, i: form}
            if (load := demand.load_s(speeds, changed)) < best:
                loaded, best = changed, load
    return loaded


def without_dearest(demand: Demand, speeds: Speeds, every: Loaded) -> Loaded:
    """``every`` without the chunks that had better be computed: leaving those out makes the longer
    of loading and computing, at the floor, shorter.

    Greedy: those that save most loading per second of computing first, of equals the last first,
    since the first chunk of a prompt stands where it was computed. Never longer than to load all or
    to compute all; where nothing is remote, beyond the best set by at most l * c / (l + c), the
    largest over the chunks, for a chunk that loads in l and computes in c. For chunks of one size
    it is the best set.
    """
    load, compute = _times(demand, speeds, every)
    changes = []
    for chunk in every:
        without_load, without_compute = _times(demand, speeds, _but(every, chunk))
        saved, added = load - without_load, without_compute - compute
        changes.append((added / saved if saved > 0 else inf, -chunk))
    loaded, best = every, max(load, compute)
    for _, negative in sorted(changes):
        fewer = _but(loaded, -negative)
        if (time := max(_times(demand, speeds, fewer))) < best:
            loaded, best = fewer, time
    nothing: Loaded = {}
    return nothing if max(_times(demand, speeds, nothing)) < best else loaded


def bettered(demand: Demand, speeds: Speeds, loaded: Loaded) -> Loaded:
    """The same chunks, each in the form that loses least without making the prompt take longer. The
    first chunks choose first, and no choice may make loading take more than :data:`MOST_LOAD` of
    the time."""
    limit = max(_times(demand, speeds, loaded))
    for i, form in loaded.items():
        for better in demand.forms[i][: demand.forms[i].index(form)]:
            changed = {**loaded, i: better}
            load, compute = _times(demand, speeds, changed)
            if compute <= limit and load <= MOST_LOAD * limit:
                loaded = changed
                break
    return loaded


def free_ratio(demand: Demand, speeds: Speeds, loaded: Loaded) -> float:
    """The largest ratio at which computing takes no longer than loading; in [floor, 1]."""
    load, least = _times(demand, speeds, loaded)
    most = demand.compute_s(speeds, loaded, 1.0)
    if load <= least or most <= least:
        return demand.floor
    return min(1.0, demand.floor + (1 - demand.floor) * (load - least) / (most - least))


def _times(demand: Demand, speeds: Speeds, loaded: Loaded) -> tuple[float, float]:
    """Seconds to load, and to compute at the floor."""
    return demand.load_s(speeds, loaded), demand.compute_s(speeds, loaded, demand.floor)


def _but(loaded: Loaded, chunk: int) -> Loaded:
    return {i: form for i, form in loaded.items() if i != chunk}


def _forms(stored: StoredChunk | None, levels: Sequence[StoredChunk]) -> tuple[Form, ...]:
    if stored is None:
        return ()
    return Form.of(stored), *(Form.of(level, level=True) for level in levels)


def _full_layers(parameters: dict[str, Any]) -> int:
    """Layers that a method computes in full before it has chosen."""
    return max(int(parameters.get("full_layers", 0)), int(parameters.get("check_layer", -1)) + 1)


def _sentences(demand: Demand, speeds: Speeds, loaded: Loaded, ratio: float) -> list[str]:
    """The choice in words. Chunks are numbered from 1, as people count."""
    every, missing = fastest(demand, speeds), len(demand.chunks) - len(demand.stored)
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
    for codec, count in Counter(form.codec for form in loaded.values() if form.codec).items():
        said.append(f"{count} of {len(loaded)} are loaded as {codec}, which takes fewer bytes.")
    if not loaded:
        return [*said, "No chunk is loaded: this is full prefill, and exact."]
    return [*said, _balance(demand, speeds, loaded, ratio)]


def _balance(demand: Demand, speeds: Speeds, loaded: Loaded, ratio: float) -> str:
    """Loading against computing, and the ratio that follows."""
    forms = demand.read(loaded)
    parts, size = len(forms), sum(form.size for form in forms)
    load, least = _times(demand, speeds, loaded)
    rows = sum(demand.chunks[i] for i in loaded)
    if ratio == demand.floor:
        verdict = f"computing takes longer, so the ratio stays at its floor, {ratio:.2f}."
    else:
        most = _time(demand.compute_s(speeds, loaded, ratio))
        verdict = f"loading takes longer, so the ratio rises to {ratio:.2f}, which takes {most}."
    rate = f" at {size / load / 1e9:.2f} GB/s" if load else ""
    full = f", all of them in {demand.full_layers} layers," if demand.full_layers else ""
    read = demand.read_s(speeds, loaded)
    still = f" ({_time(speeds.stolen * read)} of it standing still)" if speeds.stolen else ""
    far = sum(form.is_remote for form in forms)
    where = f" ({far} of {parts} parts over the link)" if far else ""
    return (
        f"Loading {size / 1e6:.1f} MB in {demand.layers * parts:,} reads{rate}{where} takes "
        f"{_time(load)}; computing {demand.floor:.0%} of the {rows:,} loaded rows{full} and all "
        f"that are not loaded, {_time(least)}{still}: {verdict}"
    )


def _numbers(chunks: list[int]) -> str:
    return ("number " if len(chunks) == 1 else "numbers ") + ", ".join(str(i + 1) for i in chunks)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
