"""Time to first token of every mode against full prefill: ``python -m bench.ttft``.

Eight chunks of a prompt whose KV is stored, with a model of random weights. Time is measured from
when the chunks are known until the logits of the first token: lookup, loading, placing, choosing
rows, computing. Modes take turns within a round; a time is the median over rounds, and a speed-up
the median of the ratios within a round. Full prefill is the engine's own: one forward with SDPA
kernels, and logits of the last row only.

The *bound* is what the hardware would allow: max(bytes / bandwidth, FLOPs / rate). The first is the
time that a reader takes for the same layers while nothing is computed. FLOPs are those of the rows
that the mode computes (products with weights, and attention to the keys that each row sees), and
the rate is that of full prefill in the same run. Efficiency is bound / measured.

*RAM*: the RAM tier, which lends its KV without copying. *Disk*: the store on disk, in the page
cache. *Cold*: the same with its files dropped from the page cache before every run. *Slow*: the RAM
tier, slowed down to take as long for its layers as computing 15 % of the rows; it sleeps for that
time, as if it were at the other end of a network. Loading and computing are then balanced, and
*first loaded, then computed* takes the sum.

Each mode's logits are compared with those of a second run, those of ``fused`` and ``cacheblend`` at
ratio 1 with full prefill's, and those of full prefill with the bare model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Lock

import torch
from rich.console import Console
from torch import Tensor

from bench import results
from bench.bound import Cost
from bench.figures import Panel
from bench.reading import drop
from bench.serving import clocked, forward, read, same
from bench.shapes import engine, prompt
from ragcache.blend import blender
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.cli import render
from ragcache.core.precompute import precompute
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import encoding_context
from ragcache.planning.lookup import chunk_keys, look_up
from ragcache.store.base import ChunkStore, StoredChunk
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.prefetch import LayerReader
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Prompt

CONTEXTS = 1024, 2048, 4096, 8192
AT = 4096  # where everything but the contexts is compared
MODES = "reuse", "fused", "cacheblend"
OTHERS = "epic", "random", "ape", "infoflow", "qcfuse", "prophet", "kvshare"
RATIOS = 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0
RATIO = 0.15
DTYPES = "float32", "bfloat16"


@dataclass(frozen=True)
class Run:
    """A mode on a prompt. Times in seconds, medians over rounds."""

    context: int  # tokens
    store: str
    mode: str
    ratio: float | None
    ttft_s: float
    faster: float  # than full prefill
    charged: float
    load_bytes: int
    load_s: float  # of a reader alone
    compute_s: float  # FLOPs / rate
    peak_mib: int

    @property
    def efficiency(self) -> float:
        return max(self.load_s, self.compute_s) / self.ttft_s


@dataclass(frozen=True)
class Found:
    workload: str
    runs: list[Run]
    balanced_s: dict[str, float]  # from the slow store: load, compute, pipelined, their sum


class Slow(RamTier):
    """Takes ``seconds`` for a layer of all chunks, asleep for most of it, and one at a time."""

    seconds = 0.0
    wire = Lock()

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[tuple[Tensor, Tensor]]:
        with self.wire:
            began = time.perf_counter()
            pairs = super().layers(chunks, layer)
            time.sleep(max(0.0, self.seconds - (time.perf_counter() - began)))
        return pairs


@dataclass
class Bench:
    """A model and one prompt whose chunks are stored below ``folder``."""

    model: TransformersEngine
    given: Prompt
    folder: Path
    stores: dict[str, ChunkStore]
    rounds: int

    @classmethod
    def of(cls, model: TransformersEngine, given: Prompt, rounds: int, opened: ExitStack) -> Bench:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="ragcache-")))
        how = encoding_context("prefix", model)
        keys = chunk_keys(given, model.fingerprint, "encoded", how, "")
        pin = model.upload is not None
        disk = opened.enter_context(DiskStore(folder / "store", pin=pin))
        precompute(model, disk, [ChunkKey(model.fingerprint, given.prefix), *keys])
        size = 2 * disk.stats().payload_bytes
        stores = {"RAM": RamTier(disk, size, pin=pin), "disk": disk, "cold": disk}
        return cls(model, given, folder, {**stores, "slow": Slow(disk, size, pin=pin)}, rounds)

    def prefill(self, store: str, mode: str, ratio: float | None) -> FusedPrompt:
        chosen, model = blender(mode, ratio), self.model
        resolved = look_up(
            self.given,
            chosen,
            self.stores[store],
            model.fingerprint,
            encoding=encoding_context("prefix", model),
        )
        assert len(resolved.misses) in (0, len(self.given.chunks))
        with LayerReader(self.stores[store], resolved.stored, upload=model.upload) as source:
            done = fuse(model, chosen, resolved.layout, source)
            done.prefilled.logits.cpu()  # a device has done by then
        # Its KV goes, as that of an answered question does, and the next one has the memory.
        return replace(done, prefilled=replace(done.prefilled, kv=None))

    def runs(self, store: str, modes: Sequence[tuple[str, float | None]]) -> list[Run]:
        """Every mode, and full prefill with them in every round."""
        every = [("full", None), *modes]
        memory, first = {}, {}
        for what in every:
            results.begin_peak()
            first[what] = self.prefill(store, *what)
            memory[what] = results.peak_mib()
        times: dict[tuple[str, float | None], list[float]] = {what: [] for what in every}
        loads = []
        for _ in range(self.rounds):
            loads.append(self._clocked(store, partial(self._read, store)))
            for what in every:
                times[what].append(self._clocked(store, partial(self.prefill, store, *what)))
        for what in every:
            again = self.prefill(store, *what).prefilled.logits
            same(self.model, what[0], again, first[what].prefilled.logits)
        return [
            self._run(store, what, first[what], times, median(loads), memory[what])
            for what in every
        ]

    def _run(
        self,
        store: str,
        what: tuple[str, float | None],
        done: FusedPrompt,
        times: dict[tuple[str, float | None], list[float]],
        load_s: float,
        peak: int,
    ) -> Run:
        cost, full = Cost.of(self.model), times["full", None]
        rate = cost.full(len(self.given), self.model.spec.layers) / median(full)
        loaded = sum(layer.load_bytes for layer in done.layers)
        every = self.model.spec.chunk_bytes(len(self.given) - len(self.given.question))
        pairs = zip(full, times[what], strict=True)
        return Run(
            len(self.given),
            store,
            *what,
            ttft_s=median(times[what]),
            faster=median(a / b for a, b in pairs),
            charged=done.charged_budget,
            load_bytes=loaded,
            load_s=load_s * loaded / every,
            compute_s=cost.fused(done) / rate,
            peak_mib=peak,
        )

    def check(self) -> None:
        """Ratio 1 is full prefill, and that is the bare model's."""
        want = forward(self.model, self.given)
        same(self.model, "full", self.prefill("RAM", "full", None).prefilled.logits, want)
        for mode in ("fused", "cacheblend"):
            same(self.model, mode, self.prefill("RAM", mode, 1.0).prefilled.logits, want)

    def balance(self) -> dict[str, float]:
        """`fused` from a store that takes as long to load as RATIO of the rows to compute."""
        slow = self.stores["slow"]
        assert isinstance(slow, Slow)
        work = partial(self.prefill, "slow", "fused", RATIO)
        compute = median(clocked(work) for _ in range(self.rounds))
        slow.seconds = compute / self.model.spec.layers
        found: dict[str, list[float]] = {"load": [], "pipelined": []}
        for _ in range(self.rounds):
            found["load"].append(clocked(partial(self._read, "slow")))
            found["pipelined"].append(clocked(work))
        load, pipelined = (median(seconds) for seconds in found.values())
        return {
            "load": load,
            "compute": compute,
            "pipelined": pipelined,
            "one after the other": load + compute,
        }

    def _read(self, store: str) -> None:
        how = encoding_context("prefix", self.model)
        keys = chunk_keys(self.given, self.model.fingerprint, "encoded", how, "")
        prefix = ChunkKey(self.model.fingerprint, self.given.prefix)
        read(self.stores[store], [prefix, *keys], self.model)

    def _clocked(self, store: str, work: Callable[[], object]) -> float:
        if store == "cold":
            drop(self.folder)
        return clocked(work)


def measure(
    contexts: Sequence[int] = CONTEXTS,
    *,
    at: int = AT,
    rounds: int = 3,
    dtypes: Sequence[str] = DTYPES,
    shape: str = "llama-110m",
    device: str = "cpu",
) -> list[Found]:
    """For every dtype: modes by context; at context ``at``, by store, every other mode, and `fused`
    by ratio."""
    return [_measure(contexts, at, rounds, dtype, shape, device) for dtype in dtypes]


def _measure(
    contexts: Sequence[int], at: int, rounds: int, dtype: str, shape: str, device: str
) -> Found:
    model = engine(getattr(torch, dtype), shape, device)
    generator = torch.Generator().manual_seed(0)
    usual = [(mode, _ratio(mode)) for mode in MODES]
    runs: list[Run] = []
    balanced: dict[str, float] = {}
    with render.progress(Console(stderr=True)) as told:
        for number, tokens in enumerate(contexts):
            with ExitStack() as opened:
                bench = Bench.of(model, prompt(tokens, generator), rounds, opened)
                bench.check()
                more: list[tuple[str, float | None]] = []
                if tokens == at:
                    more = [(mode, _ratio(mode)) for mode in OTHERS]
                    more += [("fused", ratio) for ratio in RATIOS]
                runs += bench.runs("RAM", [*usual, *more])
                if tokens == at:
                    runs += bench.runs("disk", usual) + bench.runs("cold", usual)
                    balanced = bench.balance()
            told("contexts", number + 1, len(contexts))
    return Found(f"{model.name}, {dtype}, {device}; 8 chunks; {rounds} rounds", runs, balanced)


def _ratio(mode: str) -> float | None:
    return RATIO if blender(mode).ratio is not None else None


def table(found: Sequence[Found]) -> str:
    return "\n".join(map(_table, found))


def _table(found: Found) -> str:
    heads = ["mode", "context", "store", "TTFT ms", "faster", "charged", "loaded", "load ms"]
    heads += ["FLOPs / rate ms", "efficiency", "peak MiB"]
    usual = [r for r in found.runs if r.mode in ("full", *MODES) and r.ratio in (None, RATIO)]
    at = max((r.context for r in found.runs if r.mode in OTHERS), default=0)
    others = [r for r in found.runs if r.mode in OTHERS]
    ratios = [r for r in found.runs if r.mode == "fused" and (r.context, r.store) == (at, "RAM")]
    parts = [f"{found.workload}, ratio {RATIO}.\n", results.table(heads, map(_row, usual))]
    if others:
        parts += [f"The other modes, {at:,} tokens:\n", results.table(heads, map(_row, others))]
        named = [[f"{run.ratio:.2f}", *_row(run)[3:]] for run in _sorted(ratios)]
        parts += ["`fused` by ratio:\n", results.table(["ratio", *heads[3:]], named)]
    if found.balanced_s:
        parts.append(_balance(found.balanced_s))
    return "\n".join(parts)


def _sorted(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run.ratio or 0.0)


def _row(run: Run) -> list[str]:
    loads = run.load_bytes > 0
    return [
        f"`{run.mode}`",
        f"{run.context:,}",
        run.store,
        f"{1e3 * run.ttft_s:,.0f}",
        f"{run.faster:.2f}",
        f"{run.charged:.1%}",
        render.size(run.load_bytes) if loads else "–",
        f"{1e3 * run.load_s:,.0f}" if loads else "–",
        f"{1e3 * run.compute_s:,.0f}",
        f"{run.efficiency:.2f}",
        f"{run.peak_mib:,}",
    ]


def _balance(seconds: dict[str, float]) -> str:
    load, compute, pipelined, apart = seconds.values()
    return (
        f"From the slow store `fused` loads in {load:.2f} s and computes in {compute:.2f} s: "
        f"pipelined {pipelined:.2f} s, {pipelined / max(load, compute):.2f} times the longer of "
        f"the two; first loaded, then computed {apart:.2f} s, {apart / pipelined:.2f} times as "
        "long.\n"
    )


def panels(found: Sequence[Found]) -> list[Panel]:
    return [panel for one in found for panel in _panels(one)]


def _panels(found: Found) -> list[Panel]:
    contexts: dict[str, list[tuple[float, float]]] = {}
    for run in found.runs:
        if run.store == "RAM" and run.mode in ("full", *MODES) and run.ratio in (None, RATIO):
            contexts.setdefault(run.mode, []).append((run.context, run.ttft_s))
    ratios = [r for r in found.runs if r.mode == "fused" and r.store == "RAM"]
    at = [r for r in ratios if r.ratio in RATIOS]
    curves = {
        "fused": [(r.ratio or 0.0, r.ttft_s) for r in _sorted(at)],
        "bound": [(r.ratio or 0.0, max(r.load_s, r.compute_s)) for r in _sorted(at)],
    }
    what = found.workload.split(", ")[1]
    drawn = [Panel(f"TTFT, {what}", "context tokens", "s", contexts, "xy")]
    return drawn + ([Panel(f"TTFT, {what}", "recompute ratio", "s", curves)] if at else [])


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--at", type=int, default=AT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--shape", default="llama-110m")
    parser.add_argument("--device", default="cpu")
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("ttft", found, table(found), out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
