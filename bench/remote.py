"""Chunks over a slow link: ``python -m bench.remote``.

Eight chunks of a random model, whose KV is only in a remote. The remote is a folder with a
simulated link: a request waits for its turn and for the time that its bytes take, and is answered
5 ms later. Time is measured from when the chunks are known until the logits of the first token:
lookup, loading, placing, choosing, computing. Times are medians over rounds, in which all take
turns; nothing is stored locally between them.

*raw*, *int8*, *cachegen*: all chunks are loaded in that codec, in mode `fused` at ratio 0.15.
*text*: nothing is loaded. *controller*: the controller chooses for every chunk, from the speeds at
which the machine computes, reads and decodes, and the recent bandwidth of the link. Its ratio is at
least 0.15, and more if loading leaves time for it.

The pipeline is compared with its bounds, with all chunks raw: *transfer* is a reader alone over the
same link, *compute* the same fusion with all KV in memory.

`raw` is checked against the same fusion from a store on disk, and *text* against the model's own
forward; the other codecs are lossy.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bench import results
from bench.serving import clocked, forward, medians, prepare, read, same
from bench.shapes import engine, prompt
from ragcache.blend import blender
from ragcache.cli import render
from ragcache.core.generate import LocalGenerator
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import encoding_context
from ragcache.planning.cost_model import Speeds
from ragcache.planning.lookup import chunk_keys
from ragcache.planning.measure import measure_speeds
from ragcache.store.base import ChunkStore, Miss, StoredChunk
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey, with_codec
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.object_store import Bucket, ObjectRange
from ragcache.store.remote.store import RemoteStore
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Plan, Prompt, Sampling

Read = TypeVar("Read")

MBITS = 100, 1_000, 10_000
PIPELINED = 1_000  # Mbit/s at which the pipeline is compared with its bounds
LEVELS = "int8", "cachegen"
LATENCY_S = 0.005
RATIO = 0.15


class Paced(Bucket):
    """With a link of ``byte_s`` seconds a byte, which all requests share in turns."""

    byte_s = 0.0

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._wire, self._free = threading.Lock(), 0.0

    def get(
        self,
        name: str,
        start: int,
        end: int,
        *,
        tag: str | None = None,
        check: Callable[[ObjectRange], Read],
    ) -> Read | None:
        size = [0]

        def seen(got: ObjectRange) -> Read:
            size[0] = len(memoryview(got.data))
            return check(got)

        asked = time.perf_counter()
        found = super().get(name, start, end, tag=tag, check=seen)
        with self._wire:
            self._free = max(asked, self._free) + self.byte_s * size[0]
            there = self._free + LATENCY_S
        time.sleep(max(0.0, there - time.perf_counter()))
        return found


@dataclass(frozen=True)
class Run:
    """One link. Times in seconds, medians over rounds."""

    mbit: int
    ttft_s: dict[str, float]  # by what is loaded
    predicted_s: float  # of the controller's plan
    chose: dict[str, int]  # what the controller made of the chunks, in the last round
    ratio: float  # as it chose

    @property
    def off(self) -> float:
        """The controller's time over that of the best."""
        others = [seconds for what, seconds in self.ttft_s.items() if what != "controller"]
        return self.ttft_s["controller"] / min(others)


@dataclass(frozen=True)
class Found:
    workload: str
    runs: list[Run]
    pipelined_s: dict[str, float]  # transfer, compute, both at once


class At(RamTier):
    """Offers every chunk in one codec, and stores nothing."""

    def __init__(self, below: RemoteStore, level: str) -> None:
        super().__init__(below, 0)
        self.level = level

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        return self.below.get_headers([with_codec(key, self.level) for key in keys], count=count)


@dataclass
class Bench:
    """A model, and one prompt whose chunks are in a remote, in every codec."""

    model: TransformersEngine
    given: Prompt
    disk: DiskStore  # that has them all
    folder: Path
    speeds: Speeds

    @classmethod
    def of(cls, model: TransformersEngine, given: Prompt, opened: ExitStack) -> Bench:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="ragcache-")))
        disk = DiskStore(folder / "full")
        objects = ChunkObjects(Bucket((folder / "remote").as_uri()))
        store = opened.enter_context(RemoteStore(disk, objects, remote_codecs=LEVELS))
        answering = LocalGenerator(model, store, encoding_context("prefix", model))
        keys = prepare(answering, given)
        store.flush()
        found = [one for one in map(store.get_header, keys) if isinstance(one, StoredChunk)]
        speeds = measure_speeds(model, store, found)
        assert speeds is not None
        return cls(model, given, disk, folder, speeds)

    def machine(self, mbit: int, opened: ExitStack) -> RemoteStore:
        """A store without room for chunks on its disk, with a link of ``mbit`` Mbit/s."""
        bucket = Paced((self.folder / "remote").as_uri())
        bucket.byte_s = 8e-6 / mbit
        disk = DiskStore(self.folder / f"machine-{mbit}", quota=Quota(0))
        return opened.enter_context(RemoteStore(disk, ChunkObjects(bucket), remote_codecs=LEVELS))

    def answer(
        self, store: ChunkStore, mode: str = "fused", speeds: Speeds | None = None
    ) -> tuple[float, Tensor, Plan | None]:
        """Seconds to the first token, its logits, and the plan, if there was one."""
        how = encoding_context("prefix", self.model)
        answering = LocalGenerator(self.model, store, how, store_misses=False)
        chosen = blender(mode, None if mode == "full" else RATIO)
        stream = answering.stream(
            PromptRequest(self.given, chosen, Sampling(max_tokens=1), speeds=speeds)
        )
        report = stream.answer.report
        assert not report.fallbacks, report.fallbacks
        return report.ttft_s, stream.first_logits, report.plan

    def run(self, mbit: int, rounds: int) -> Run:
        with ExitStack() as opened:
            store = self.machine(mbit, opened)
            plans: list[Plan] = []

            def controller() -> float:
                seconds, _, plan = self.answer(store, speeds=self.speeds)
                assert plan is not None
                plans.append(plan)
                return seconds

            works: dict[str, Callable[[], float]] = {"raw": lambda: self.answer(store)[0]}
            for level in LEVELS:
                works[level] = partial(lambda level: self.answer(At(store, level))[0], level)
            works |= {"text": lambda: self.answer(store, "full")[0], "controller": controller}
            seconds: dict[str, list[float]] = {what: [] for what in works}
            for number in range(rounds):
                for what in np.roll(list(works), number).tolist():  # none always follows the same
                    seconds[what].append(works[what]())
        plan = plans[-1]
        chose = Counter({"text": len(plan.recompute)})
        chose.update(LEVELS[level - 1] for level in plan.levels.values())
        chose["raw"] = len(self.given.chunks) - chose.total()
        ttft = {what: median(taken) for what, taken in seconds.items()}
        predicted = median(plan.prefill_s for plan in plans)
        return Run(mbit, ttft, predicted, {w: n for w, n in chose.items() if n}, plan.ratio)

    def pipelined(self, mbit: int, rounds: int) -> dict[str, float]:
        with ExitStack() as opened:
            store = self.machine(mbit, opened)
            how, model = encoding_context("prefix", self.model), self.model
            keys = [ChunkKey(model.fingerprint, self.given.prefix)]
            keys += chunk_keys(self.given, model.fingerprint, "encoded", how, "")
            here = RamTier(self.disk, 2 * self.disk.stats().payload_bytes)
            read(here, keys)
            works = {
                "transfer": lambda: clocked(lambda: read(store, keys)),
                "compute": lambda: self.answer(here)[0],
                "pipelined": lambda: self.answer(store)[0],
            }
            return medians(works, rounds)

    def check(self) -> None:
        with ExitStack() as opened:
            store = self.machine(10_000, opened)
            here, there = (self.answer(each)[1] for each in (self.disk, store))
            assert torch.equal(here, there), "chunks over a link are not those on disk"
            text = self.answer(store, "full")[1]
            same(self.model, "text", text, forward(self.model, self.given))


def measure(
    mbits: Sequence[int] = MBITS, *, context: int = 2048, rounds: int = 5, dtype: str = "float32"
) -> Found:
    """A prompt of ``context`` tokens over every link."""
    model = engine(getattr(torch, dtype))
    given = prompt(context, torch.Generator().manual_seed(0))
    with ExitStack() as opened:
        told = opened.enter_context(render.progress(Console(stderr=True)))
        bench = Bench.of(model, given, opened)
        bench.check()
        runs = []
        for number, mbit in enumerate(mbits, 1):
            runs.append(bench.run(mbit, rounds))
            told("links", number, len(mbits))
        pipelined = bench.pipelined(PIPELINED, rounds)
        size = model.spec.chunk_bytes(sum(map(len, given.chunks)))
    workload = (
        f"{model.name}, {dtype}; 8 chunks, {context:,} tokens in all, {render.size(size)} of KV; "
        f"{rounds} rounds"
    )
    return Found(workload, runs, pipelined)


def table(found: Found) -> str:
    heads = ["link", *found.runs[0].ttft_s, "as planned", "of the best", "chunks", "ratio"]
    rows = [
        [
            f"{run.mbit / 1000:g} Gbit/s",
            *(f"{seconds:.2f}" for seconds in run.ttft_s.values()),
            f"{run.predicted_s:.2f}",
            f"{run.off:.2f}",
            ", ".join(f"{n} {what}" for what, n in run.chose.items()),
            f"{run.ratio:.2f}",
        ]
        for run in found.runs
    ]
    transfer, compute, both = found.pipelined_s.values()
    return (
        f"{found.workload}. TTFT in seconds.\n\n{results.table(heads, rows)}\n"
        f"At {PIPELINED / 1000:g} Gbit/s, raw, transfer takes {transfer:.2f} s and compute "
        f"{compute:.2f} s: pipelined {both:.2f} s, {both / max(transfer, compute):.2f} times the "
        "longer of the two.\n"
    )


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--mbits", type=int, nargs="+", default=MBITS)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("remote", found, table(found), out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
