"""Requests per second under load: ``python -m bench.load``.

Questions arrive at random (a Poisson process) at one server that answers them one at a time, in
order of arrival. Their chunks are drawn from a corpus by Zipf's law (exponent 1), in random order.
The KV of the whole corpus is in a RAM tier in front of a store on disk. ``prefix`` has its own RAM
tier and store of the same size, which the requests before the first measured one have filled. The
time to copy what it misses out of the prompt is included, the time to store it is not.

Every request is served in every mode in turn, one after another, which gives its times to the first
and to the last token. Arrivals at any rate are then replayed through the queue: a request waits for
those before it (W = max(0, W + S - A), Lindley's recursion, where S is the service time of the
preceding request and A the time between their arrivals), and its TTFT is that wait plus its own.
This is exact for a single first-come, first-served server whose service time does not depend on
load. Requests are repeated in the same order until there are enough. One mode is also served in
real time, by a thread that submits and one that answers, to validate the replay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from bench import results
from bench.corpus import QUESTION, Corpus, ids
from bench.figures import Panel
from bench.queueing import Mode, Seconds, percentiles, poisson, rate_within, ttft
from bench.serving import Served, check, prepare, read, same, serve
from bench.shapes import engine
from ragcache.cli import render
from ragcache.core.generate import LocalGenerator
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import encoding_context
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.store import DiskStore
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Prompt

MODES = "full", "prefix", "reuse", "cacheblend", "fused"
LOADS = 0.5, 0.7, 0.9, 0.95  # of what full prefill can take
AT = 0.9  # the load at which full prefill's p95 is the limit for the other modes
CLOCKED_LOAD = 0.7  # load of the mode that is served in real time


@dataclass(frozen=True)
class Clocked:
    """Requests that were served by the clock: the first ones, from the first again if need be."""

    gaps_s: list[float]  # between arrivals
    ttft_s: list[float]  # from arrival, waiting included
    taken: Mode  # what they took once it was their turn


@dataclass(frozen=True)
class Load:
    workload: str
    seed: int
    modes: list[Mode]
    clocked: Clocked


def measure(
    requests: int = 100,
    *,
    modes: Sequence[str] = MODES,
    before: int = 16,
    corpus: int = 64,
    chunk_tokens: int = 256,
    chunks: int = 8,
    answer_tokens: int = 8,
    dtype: str = "float32",
    clocked_requests: int = 60,
    seed: int = 0,
) -> Load:
    """Serve ``requests`` in every mode, after ``before`` requests that only fill the store of
    `prefix`, and in the last mode in real time."""
    model = engine(getattr(torch, dtype))
    rng = np.random.default_rng(seed)
    made = Corpus(rng, model.template.prefix, [ids(rng, chunk_tokens) for _ in range(corpus)])
    early = [made.prompt(chunks) for _ in range(before)]
    prompts = [made.prompt(chunks) for _ in range(requests)]
    with ExitStack() as opened:
        told = opened.enter_context(render.progress(Console(stderr=True)))
        answering, below = _answering(model, made, modes, opened)
        for number, prompt in enumerate(early):
            for name in modes if number == before - 1 else ["prefix"]:  # all, to warm up
                serve(answering[name], prompt, name, answer_tokens)
            told("before", number + 1, before)
        served: dict[str, list[Served]] = {name: [] for name in modes}
        for number, prompt in enumerate(prompts):
            for name in np.roll(modes, number).tolist():  # none always follows the same one
                served[name].append(serve(answering[name], prompt, name, answer_tokens))
            told("requests", number + 1, requests)
        found = [_mode(name, served[name]) for name in modes]
        gaps = rng.exponential(1 / (CLOCKED_LOAD * found[-1].saturation), clocked_requests)
        asked = [prompts[at % requests] for at in range(clocked_requests)]
        by_clock = _by_clock(answering[modes[-1]], asked, modes[-1], gaps.tolist(), answer_tokens)
        for full, prefix in zip(served["full"], served["prefix"], strict=True):
            same(model, "prefix", prefix.logits, full.logits)
        last = {name: served[name][-1].logits for name in modes}
        check(model, below, prompts[-1], last)
        size = below.store.stats().payload_bytes
    workload = (
        f"{model.name}, {dtype}; {requests} requests of {chunks} chunks of {chunk_tokens} tokens, "
        f"out of {corpus}, and {QUESTION} tokens of question; {answer_tokens} tokens of answer; "
        f"{size >> 20} MiB of KV"
    )
    return Load(workload, seed, found, by_clock)


def _answering(
    model: TransformersEngine, corpus: Corpus, modes: Sequence[str], opened: ExitStack
) -> tuple[dict[str, LocalGenerator], LocalGenerator]:
    """A generator for every mode, with its RAM tier; and the store of the whole corpus."""
    folder = Path(opened.enter_context(TemporaryDirectory()))
    disk, how = DiskStore(folder / "chunks"), encoding_context("prefix", model)
    below = LocalGenerator(model, disk, how)
    keys = prepare(below, Prompt.of(corpus.prefix, tuple(corpus.texts), ()))
    size = disk.stats().payload_bytes
    store = opened.enter_context(RamTier(disk, size))
    read(store, keys)
    own = DiskStore(folder / "prefixes", quota=Quota(size))
    prefixes = opened.enter_context(RamTier(own, size))
    stores = {name: prefixes if name == "prefix" else store for name in modes}
    return {name: LocalGenerator(model, tier, how) for name, tier in stores.items()}, below


def _mode(name: str, served: Sequence[Served]) -> Mode:
    reused = float(np.mean([one.reused for one in served]))
    return Mode(name, [one.ttft_s for one in served], [one.total_s for one in served], reused)


def _by_clock(
    answering: LocalGenerator, prompts: Sequence[Prompt], mode: str, gaps: list[float], tokens: int
) -> Clocked:
    """Submit by the clock from another thread, and answer as they come in this one."""
    queue: Queue[tuple[float, Prompt]] = Queue()
    began = time.perf_counter()

    def submit() -> None:
        for at, prompt in zip(accumulate(gaps), prompts, strict=True):
            time.sleep(max(0.0, began + at - time.perf_counter()))
            queue.put((began + at, prompt))

    threading.Thread(target=submit, daemon=True).start()
    waited, served = [], []
    for _ in prompts:
        arrived, prompt = queue.get()
        waited.append(time.perf_counter() - arrived)
        served.append(serve(answering, prompt, mode, tokens))
    ttft = [wait + one.ttft_s for wait, one in zip(waited, served, strict=True)]
    return Clocked(gaps, ttft, _mode(mode, served))


def table(found: Load) -> str:
    full = _full(found)
    gaps = poisson(found.seed)
    limit = percentiles(ttft(full, gaps / (AT * full.saturation)))[1]
    heads = ["mode", "reused", "TTFT alone ms", "service ms", "requests/s at most", "of full's"]
    heads += [f"requests/s at p95 TTFT of {limit:.1f} s", "of full's"]
    rows, tails = [], []
    for mode in found.modes:
        rate = rate_within(mode, limit, gaps)
        times = (f"{1e3 * float(np.mean(all_)):,.0f}" for all_ in (mode.ttft_s, mode.total_s))
        rows.append([f"`{mode.name}`", f"{mode.reused:.0%}", *times, f"{mode.saturation:.2f}"])
        rows[-1] += [f"{mode.saturation / full.saturation:.2f}"]
        rows[-1] += [f"{rate:.2f}", f"{rate / (AT * full.saturation):.2f}"]
        tails.append([f"`{mode.name}`", *(_tail(mode, x * full.saturation, gaps) for x in LOADS)])
    rates = (f"{load:.0%}: {load * full.saturation:.2f}/s" for load in LOADS)
    return "\n".join(
        [
            f"{found.workload}.\n",
            results.table(heads, rows),
            f"The p95 is that of `full` at {AT:.0%} of what it can take. TTFT in seconds, p50 / "
            "p95 / p99, at loads that are shares of that:\n",
            results.table(["mode", *rates], tails),
            _agreement(found),
        ]
    )


def _full(found: Load) -> Mode:
    return next(mode for mode in found.modes if mode.name == "full")


def _tail(mode: Mode, rate: float, gaps: Seconds) -> str:
    if rate >= mode.saturation:
        return "–"  # the queue grows for as long as requests come
    return _spelled(ttft(mode, gaps / rate))


def _spelled(times: Sequence[float] | Seconds) -> str:
    return " / ".join(f"{q:.2f}" for q in percentiles(times))


def _agreement(found: Load) -> str:
    clocked, gaps = found.clocked, np.array(found.clocked.gaps_s)
    alone = next(mode for mode in found.modes if mode.name == clocked.taken.name)
    return (
        f"By the clock, {len(gaps)} requests in mode `{alone.name}` at "
        f"{CLOCKED_LOAD * alone.saturation:.2f}/s: TTFT {_spelled(clocked.ttft_s)} s. The same "
        f"arrivals replayed: {_spelled(ttft(alone, gaps))} s, and with what the requests took in "
        f"that run: {_spelled(ttft(clocked.taken, gaps))} s.\n"
    )


def panels(found: Load) -> list[Panel]:
    gaps = poisson(found.seed)
    curves: dict[str, list[tuple[float, float]]] = {}
    for mode in found.modes:
        rates = mode.saturation * np.linspace(0.05, 0.97, 24)
        tails = (percentiles(ttft(mode, gaps / rate))[1] for rate in rates)
        curves[mode.name] = list(zip(rates.tolist(), tails, strict=True))
    return [Panel("Poisson arrivals, one server", "requests/s", "p95 TTFT (s)", curves, "y")]


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument(
        "--mode", action="append", help="beside full and prefix; the last by the clock"
    )
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--before", type=int, default=16, help="that fill the store of prefix")
    parser.add_argument("--corpus", type=int, default=64, help="chunks")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clocked-requests", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    out = given.pop("out")
    if own := given.pop("mode"):
        given["modes"] = ("full", "prefix", *own)
    found = measure(**given)
    results.finish("load", found, table(found), out)


if __name__ == "__main__":
    main()
