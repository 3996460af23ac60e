"""Run a plan: batches are computed by this process or by others, and stored by this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.batch.plan import PrecomputePlan, WorkSize
from ragcache.core.precompute import Batch, Steps, compute_batch, drive, skip_stored

if TYPE_CHECKING:
    from ragcache.core.indexing import Step
    from ragcache.engine.base import ChunkEngine
    from ragcache.rag import RagCache
    from ragcache.store.base import ChunkStore
    from ragcache.types import ChunkKV

__all__ = [
    "BatchComputer",
    "PrecomputeResult",
    "RunProgress",
    "compute_locally",
    "iter_run",
    "iter_run_locally",
    "measure_tokens_per_second",
    "run",
]

#: Batches and their KV as they are finished: in any order, each once.
ComputedBatches = Generator[tuple[Batch, list["ChunkKV"]], None, None]
#: Computes batches, and takes only as many of them as it can work on.
BatchComputer = Callable[[Iterable[Batch]], ComputedBatches]

_SAMPLE_TOKENS = 512  # computed to measure the speed


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What a run has computed and stored so far."""

    computed: WorkSize
    planned: WorkSize  # the missing chunks of the plan
    seconds: float


@dataclass(frozen=True, slots=True)
class PrecomputeResult:
    """The result of precomputing documents."""

    work: PrecomputePlan
    done: RunProgress

    def summary(self) -> str:
        """A sentence: how many chunks were computed and stored before, and which were skipped."""
        stored, skipped = self.work.stored.chunks, self.work.skipped
        summary = f"KV of {self.done.computed.chunks} chunks computed, {stored} were there"
        if skipped:
            first = f"{skipped[0].document}: {skipped[0].why}"
            summary += f"; {len(skipped)} documents skipped, the first is {first}"
        return summary


def iter_run_locally(
    cache: RagCache, work: PrecomputePlan
) -> Generator[Step, None, PrecomputeResult]:
    """Run a plan in this process, as a generator of progress steps."""
    steps = Steps(iter_run(cache.chunks, work, compute_locally(cache.engine)))
    for (done,) in steps:
        yield "precompute", done.computed.chunks, work.missing.chunks
    return PrecomputeResult(work, steps.result)


def compute_locally(engine: ChunkEngine) -> BatchComputer:
    """A computer of batches in this process, one after another."""

    def compute_batches(batches: Iterable[Batch]) -> ComputedBatches:
        for batch in batches:
            yield batch, compute_batch(engine, batch)

    return compute_batches


def run(
    store: ChunkStore,
    work: PrecomputePlan,
    computer: BatchComputer,
    *,
    limit: int | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> RunProgress:
    """Compute and store the missing chunks of ``work``, except those stored in the meantime.

    A batch is durable when ``progress`` is called for it. The run ends after the batch with which
    ``limit`` chunks are computed: batches are never split, because that would change bits.
    """
    return drive(iter_run(store, work, computer, limit=limit), progress)


def iter_run(
    store: ChunkStore, work: PrecomputePlan, computer: BatchComputer, *, limit: int | None = None
) -> Generator[tuple[RunProgress], None, RunProgress]:
    """As :func:`run`, as a generator of the progress after every batch."""
    began, computed = time.perf_counter(), WorkSize()
    due = _limited(skip_stored(store, work.batches), limit)
    with closing(computer(due)) as results:
        for batch, kvs in results:
            store.put_all(zip(batch.keys, kvs, strict=True))
            computed += work.estimator.of(batch)
            yield (RunProgress(computed, work.missing, time.perf_counter() - began),)
    return RunProgress(computed, work.missing, time.perf_counter() - began)


def _limited(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    given = 0
    for batch in batches:
        if limit is not None and given >= limit:
            return
        given += len(batch)
        yield batch


def measure_tokens_per_second(engine: ChunkEngine, work: PrecomputePlan) -> float | None:
    """The speed at which this process computes a sample of ``work``; None if nothing is missing.

    The result is discarded.
    """
    batch = next(work.batches, None)
    if batch is None:
        return None
    largest = next((b for b in work.batches if b.tokens >= _SAMPLE_TOKENS), batch)
    keys = [largest.keys[0]]
    for key in largest.keys[1:]:
        if sum(len(k.tokens) for k in keys) + len(key.tokens) > _SAMPLE_TOKENS:
            break
        keys.append(key)
    sample = Batch(largest.context, tuple(keys))
    compute_batch(engine, Batch(largest.context, sample.keys[:1]))  # computes the context once
    began = time.perf_counter()
    compute_batch(engine, sample)
    return sample.tokens / (time.perf_counter() - began)
