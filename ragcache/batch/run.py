"""Doing what is planned: batches computed by this process or by others, and stored by this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.batch.plan import PrecomputePlan, WorkSize, iter_plan
from ragcache.core.precompute import BATCH_TOKENS, Batch, compute, drive, unless_stored

if TYPE_CHECKING:
    from ragcache.core.indexing import Step
    from ragcache.engine.base import ChunkEngine
    from ragcache.rag import RagCache
    from ragcache.store.base import ChunkStore
    from ragcache.types import ChunkKV, Document, StageProgress

#: Batches and their KV, as they are done: in any order, each of those that were given once.
ComputedBatches = Generator[tuple[Batch, list["ChunkKV"]], None, None]
#: Computes batches, and takes no more of them than it can have under way.
BatchComputer = Callable[[Iterable[Batch]], ComputedBatches]

_TRIED = 512  # tokens computed to see how fast that is


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What a run has computed and stored so far, of what was missing."""

    computed: WorkSize
    planned: WorkSize
    seconds: float


@dataclass(frozen=True, slots=True)
class PrecomputeResult:
    """What became of documents whose KV was to be computed."""

    work: PrecomputePlan
    done: RunProgress

    def summary(self) -> str:
        """A sentence: what was computed, what was there, and what was left out."""
        stored, skipped = self.work.stored.chunks, self.work.skipped
        said = f"KV of {self.done.computed.chunks} chunks computed, {stored} were there"
        if skipped:
            first = f"{skipped[0].document}: {skipped[0].why}"
            said += f"; {len(skipped)} documents skipped, the first is {first}"
        return said


def iter_precompute(
    cache: RagCache, documents: Iterable[Document], *, batch_tokens: int = BATCH_TOKENS
) -> Generator[Step, None, PrecomputeResult]:
    """Plan and do it in this process, in steps: what is being done, how much of it, out of how
    much."""
    work = yield from iter_plan(cache, documents, batch_tokens=batch_tokens)
    return (yield from iter_run_locally(cache, work))


def iter_run_locally(
    cache: RagCache, work: PrecomputePlan
) -> Generator[Step, None, PrecomputeResult]:
    """The second half of :func:`iter_precompute`: what was planned."""
    steps = iter_run(cache.chunks, work, compute_locally(cache.engine))
    while True:
        try:
            (done,) = next(steps)
        except StopIteration as end:
            return PrecomputeResult(work, end.value)
        yield "precompute", done.computed.chunks, work.missing.chunks


def precompute(
    cache: RagCache, documents: Iterable[Document], progress: StageProgress | None = None
) -> PrecomputeResult:
    """Compute and store the KV of documents that are not indexed, or not yet, in this process.

    A second call does what is missing. For several processes or machines, see
    :func:`ragcache.batch.plan.make_plan` and :func:`run`.
    """
    return drive(iter_precompute(cache, documents), progress)


def compute_locally(engine: ChunkEngine) -> BatchComputer:
    """By this process, one batch after another."""

    def computing(every: Iterable[Batch]) -> ComputedBatches:
        for batch in every:
            yield batch, compute(engine, batch)

    return computing


def run(
    store: ChunkStore,
    work: PrecomputePlan,
    computing: BatchComputer,
    *,
    limit: int | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> RunProgress:
    """Compute and store what ``work`` lacks; what others have stored meanwhile is left out.

    A batch is durable once it has been told of. After the batch with which ``limit`` chunks are
    computed there is no further one: batches are never cut, for that would change bits.
    """
    return drive(iter_run(store, work, computing, limit=limit), progress)


def iter_run(
    store: ChunkStore, work: PrecomputePlan, computing: BatchComputer, *, limit: int | None = None
) -> Generator[tuple[RunProgress], None, RunProgress]:
    """As :func:`run`, a step after every batch."""
    began, computed = time.perf_counter(), WorkSize()
    due = _limited(unless_stored(store, work.batches), limit)
    with closing(computing(due)) as results:
        for batch, kvs in results:
            store.put_all(zip(batch.keys, kvs, strict=True))
            computed += work.measure.of(batch)
            yield (RunProgress(computed, work.missing, time.perf_counter() - began),)
    return RunProgress(computed, work.missing, time.perf_counter() - began)


def _limited(every: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    given = 0
    for batch in every:
        if limit is not None and given >= limit:
            return
        given += len(batch)
        yield batch


def measure_tokens_per_second(engine: ChunkEngine, work: PrecomputePlan) -> float | None:
    """How fast this process computes the beginning of ``work``; None where nothing is missing.

    What it computes is thrown away.
    """
    batch = next(work.batches, None)
    if batch is None:
        return None
    largest = next((b for b in work.batches if b.tokens >= _TRIED), batch)
    keys = [largest.keys[0]]
    for key in largest.keys[1:]:
        if sum(len(k.tokens) for k in keys) + len(key.tokens) > _TRIED:
            break
        keys.append(key)
    tried = Batch(largest.behind, tuple(keys))
    compute(engine, Batch(largest.behind, tried.keys[:1]))  # what stands before is computed once
    began = time.perf_counter()
    compute(engine, tried)
    return tried.tokens / (time.perf_counter() - began)
