"""How cost grows with the context, the number of chunks and the store: ``python -m bench.growth``.

TTFT is measured from when the chunks are known. Modes take turns, and a figure is the median over
rounds; the KV is in a store on disk, in the page cache. Memory is the peak of the process,
including the model and the mapped part of the store, in a round that is not timed.

- *Context*: eight chunks of increasing length. The slope is that of log t over log N; a + bN + cN^2
  is fitted by least squares of relative errors, with no coefficient below 0. A mode that computes
  the share r of the tokens attends from those to all N, and therefore also has a term in N^2: r
  times that of full prefill.
- *Chunks*: the same tokens, split into more and more chunks. Full prefill does not depend on this.
- *Store*: the same eight chunks of 64 tokens of a small model, in stores filled with more and more
  chunks of the same size, in documents of ten; the stores take turns. Finding and reading means
  looking the chunks up and reading all their layers; retrieving means embedding a question (a bag
  of words, which takes almost no time) and searching the exact index of 384 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from bench import results
from bench.corpus import cut
from bench.figures import Panel
from bench.filled import DIMENSION, fill, small
from bench.fits import parts, slope
from bench.serving import check, clocked, medians, peaks, prepare, read, serve
from bench.shapes import engine, prompt
from ragcache.cli import render
from ragcache.core.generate import LocalGenerator
from ragcache.core.indexing import Progress
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import encoding_context
from ragcache.retriever.embed import HashEmbedder
from ragcache.retriever.search import Retriever
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.types import Prompt

FUSING = "cacheblend", "fused", "reuse"
MODES = "full", *FUSING
CONTEXTS = 512, 1024, 2048, 4096, 8192  # tokens
CUTS = 2, 4, 8, 16, 32, 64  # chunks
STORES = 10, 100, 1000, 10_000  # chunks
LOG = {"context": "xy", "chunks": "x", "store": "xy"}  # axes of the figure
SWEEPS = {"context": "tokens", "chunks": "chunks in the prompt", "store": "chunks in the store"}
ASKED = 48 + 8 * 64  # tokens of the small model's prompt
STORE_ROUNDS = 15  # what is timed there takes milliseconds


@dataclass(frozen=True)
class Point:
    sweep: str  # one of SWEEPS
    at: int  # how many of what the sweep counts
    what: str  # a mode, or a part of the work
    seconds: float
    peak_mib: int


@dataclass(frozen=True)
class Growth:
    workload: str
    points: list[Point]


def measure(
    contexts: Sequence[int] = CONTEXTS,
    cuts: Sequence[int] = CUTS,
    stores: Sequence[int] = STORES,
    *,
    cut_tokens: int = 4096,
    rounds: int = 3,
    dtype: str = "float32",
) -> Growth:
    model = engine(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    by_context = {tokens: prompt(tokens, generator) for tokens in contexts}
    whole = prompt(cut_tokens, generator)
    by_cut = {chunks: cut(whole, chunks) for chunks in cuts}
    points: list[Point] = []
    with render.progress(Console(stderr=True)) as told:
        for number, (at, given) in enumerate(by_context.items()):
            found = _served(model, given, MODES, rounds)
            points += (Point("context", at, what, *cost) for what, cost in found.items())
            told("context", number + 1, len(by_context))
        for number, (at, given) in enumerate(by_cut.items()):
            found = _served(model, given, FUSING, rounds)
            points += (Point("chunks", at, what, *cost) for what, cost in found.items())
            told("chunks", number + 1, len(by_cut))
        points += _in_stores(stores, STORE_ROUNDS, told)
    workload = f"{model.name}, {dtype}; chunks are cut from {cut_tokens} tokens; {rounds} rounds"
    return Growth(workload, points)


def _served(
    model: TransformersEngine, given: Prompt, modes: Sequence[str], rounds: int
) -> dict[str, tuple[float, int]]:
    """Per mode: median TTFT, and peak memory in MiB."""
    with TemporaryDirectory() as folder, DiskStore(folder) as store:
        answering = _answering(model, store)
        prepare(answering, given)
        logits = {}

        def first(mode: str) -> float:
            served = serve(answering, given, mode)
            logits[mode] = served.logits
            return served.ttft_s

        works = {mode: partial(first, mode) for mode in modes}
        memory = peaks(works)
        seconds = medians(works, rounds)
        check(model, answering, given, logits)
    return {mode: (seconds[mode], memory[mode]) for mode in modes}


def _in_stores(sizes: Sequence[int], rounds: int, told: Progress) -> Iterator[Point]:
    """All stores take turns: filling the large ones keeps the disk busy for a while."""
    model, given = small(), prompt(ASKED, torch.Generator().manual_seed(0))
    memory: dict[tuple[int, str], int] = {}
    with TemporaryDirectory() as made, ExitStack() as opened:
        folders = {size: Path(made) / str(size) for size in sizes}
        for size, folder in folders.items():
            with DiskStore(folder) as store:
                [like, *_] = prepare(_answering(model, store), given)
                fill(store, like, range(size), partial(told, f"{size:,} chunks"))
            with DiskStore(folder) as store:  # with nothing mapped yet, and none of the others open
                works = _works(_answering(model, store), given, folder)
                memory |= {(size, what): peak for what, peak in peaks(works).items()}
        answering = {
            size: _answering(model, opened.enter_context(DiskStore(folder)))
            for size, folder in folders.items()
        }
        turns = {
            (size, what): work
            for size, folder in folders.items()
            for what, work in _works(answering[size], given, folder).items()
        }
        peaks(turns)
        seconds = medians(turns, rounds)
        for asked in answering.values():
            check(model, asked, given, {"fused": serve(asked, given, "fused").logits})
    for (size, what), taken in seconds.items():
        yield Point("store", size, what, taken, memory[size, what])


def _answering(model: TransformersEngine, store: DiskStore) -> LocalGenerator:
    return LocalGenerator(model, store, encoding_context("prefix", model))


def _works(
    answering: LocalGenerator, given: Prompt, folder: Path
) -> dict[str, Callable[[], float]]:
    """What may depend on the size of the store, each giving the seconds that it took."""
    store = answering.store
    assert isinstance(store, DiskStore)
    keys = prepare(answering, given)
    retriever = Retriever(Catalog(store), HashEmbedder(DIMENSION), folder / "vectors.index")
    return {
        "find and read": partial(clocked, partial(read, store, keys)),
        "retrieve": partial(clocked, partial(retriever.retrieve, "What is where?", len(keys))),
        "TTFT of fused": lambda: serve(answering, given, "fused").ttft_s,
    }


def table(found: Growth) -> str:
    shown = [f"{found.workload}.\n"]
    for sweep in SWEEPS:
        shown += [_times(found, sweep), *([_fits(found)] if sweep == "context" else [])]
        shown += [_memory(found, sweep)]
    return "\n".join(shown)


def _curves(found: Growth, sweep: str) -> dict[str, list[Point]]:
    points = [point for point in found.points if point.sweep == sweep]
    whats = dict.fromkeys(point.what for point in points)
    return {what: [p for p in points if p.what == what] for what in whats}


def _sizes(found: Growth, sweep: str) -> list[str]:
    [points, *_] = _curves(found, sweep).values()
    return [f"{point.at:,}" for point in points]


def _times(found: Growth, sweep: str) -> str:
    rows = []
    for what, points in _curves(found, sweep).items():
        times = (f"{1e3 * point.seconds:,.1f}" for point in points)
        rows.append([what, *times, f"{_slope(points):.2f}"])
    return results.table([f"ms at {SWEEPS[sweep]}", *_sizes(found, sweep), "slope"], rows)


def _slope(points: Sequence[Point]) -> float:
    found = slope([point.at for point in points], [point.seconds for point in points])
    return round(found, 2) + 0.0  # no -0.00


def _fits(found: Growth) -> str:
    rows = []
    for what, points in _curves(found, "context").items():
        most = points[-1].at
        a, b, c = parts([point.at for point in points], [point.seconds for point in points])
        whole = a + b * most + c * most**2
        row = [what, f"{1e3 * a:.1f}", f"{1e6 * b:.1f}", f"{1e9 * c:.2f}"]
        rows.append([*row, f"{b * most / whole:.0%}", f"{c * most**2 / whole:.0%}"])
    heads = ["fitted", "a, ms", "b, µs a token", "c, ns a token^2"]
    return results.table([*heads, f"linear at {most:,}", f"quadratic at {most:,}"], rows)


def _memory(found: Growth, sweep: str) -> str:
    rows = [
        [what, *(f"{point.peak_mib:,}" for point in points)]
        for what, points in _curves(found, sweep).items()
    ]
    return results.table([f"MiB at {SWEEPS[sweep]}", *_sizes(found, sweep)], rows)


def panels(found: Growth) -> list[Panel]:
    made = []
    for sweep, counted in SWEEPS.items():
        curves = {
            what: [(point.at, 1e3 * point.seconds) for point in points]
            for what, points in _curves(found, sweep).items()
        }
        made.append(Panel(sweep.capitalize(), counted, "ms", curves, LOG[sweep]))
    return made


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens")
    parser.add_argument("--cuts", type=int, nargs="+", default=CUTS, help="chunks")
    parser.add_argument("--cut-tokens", type=int, default=4096)
    parser.add_argument("--stores", type=int, nargs="+", default=STORES, help="chunks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("growth", found, table(found), out)


if __name__ == "__main__":
    main()
