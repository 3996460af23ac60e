"""Doing what is planned: batches computed by this process or by others, and stored by this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.batch.plan import Size, Work, planning
from ragcache.core.precompute import BATCH_TOKENS, Batch, Steps, compute_batch, drive, skip_stored

if TYPE_CHECKING:
    from ragcache.core.indexing import Progress, Step
    from ragcache.engine.base import ChunkEngine
    from ragcache.rag import RagCache
    from ragcache.store.base import ChunkStore
    from ragcache.types import ChunkKV, Document

#: Batches and their KV, as they are done: in any order, each of those that were given once.
Computed = Generator[tuple[Batch, list["ChunkKV"]], None, None]
#: Computes batches, and takes no more of them than it can have under way.
Computing = Callable[[Iterable[Batch]], Computed]

_TRIED = 512  # tokens computed to see how fast that is


@dataclass(frozen=True, slots=True)
class Done:
    """What a run has computed and stored so far, of what was missing."""

    computed: Size
    planned: Size
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of documents whose KV was to be computed."""

    work: Work
    done: Done

    def summary(self) -> str:
        """A sentence: what was computed, what was there, and what was left out."""
        stored, skipped = self.work.stored.chunks, self.work.skipped
        said = f"KV of {self.done.computed.chunks} chunks computed, {stored} were there"
        if skipped:
            first = f"{skipped[0].document}: {skipped[0].why}"
            said += f"; {len(skipped)} documents skipped, the first is {first}"
        return said


def precomputing(
    cache: RagCache, documents: Iterable[Document], *, batch_tokens: int = BATCH_TOKENS
) -> Generator[Step, None, Finished]:
    """Plan and do it in this process, in steps: what is being done, how much of it, out of how
    much."""
    work = yield from planning(cache, documents, batch_tokens=batch_tokens)
    return (yield from finishing(cache, work))


def finishing(cache: RagCache, work: Work) -> Generator[Step, None, Finished]:
    """The second half of :func:`precomputing`: what was planned."""
    steps = Steps(running(cache.chunks, work, in_process(cache.engine)))
    for (done,) in steps:
        yield "precompute", done.computed.chunks, work.missing.chunks
    return Finished(work, steps.result)


def precompute(
    cache: RagCache, documents: Iterable[Document], progress: Progress | None = None
) -> Finished:
    """Compute and store the KV of documents that are not indexed, or not yet, in this process.

    A second call does what is missing. For several processes or machines, see
    :func:`ragcache.batch.plan.plan` and :func:`run`.
    """
    return drive(precomputing(cache, documents), progress)


def in_process(engine: ChunkEngine) -> Computing:
    """By this process, one batch after another."""

    def computing(every: Iterable[Batch]) -> Computed:
        for batch in every:
            yield batch, compute_batch(engine, batch)

    return computing


def run(
    store: ChunkStore,
    work: Work,
    computing: Computing,
    *,
    limit: int | None = None,
    progress: Callable[[Done], None] | None = None,
) -> Done:
    """Compute and store what ``work`` lacks; what others have stored meanwhile is left out.

    A batch is durable once it has been told of. After the batch with which ``limit`` chunks are
    computed there is no further one: batches are never cut, for that would change bits.
    """
    return drive(running(store, work, computing, limit=limit), progress)


def running(
    store: ChunkStore, work: Work, computing: Computing, *, limit: int | None = None
) -> Generator[tuple[Done], None, Done]:
    """As :func:`run`, a step after every batch."""
    began, computed = time.perf_counter(), Size()
    due = _limited(skip_stored(store, work.batches), limit)
    with closing(computing(due)) as results:
        for batch, kvs in results:
            store.put_all(zip(batch.keys, kvs, strict=True))
            computed += work.measure.of(batch)
            yield (Done(computed, work.missing, time.perf_counter() - began),)
    return Done(computed, work.missing, time.perf_counter() - began)


def _limited(every: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    given = 0
    for batch in every:
        if limit is not None and given >= limit:
            return
        given += len(batch)
        yield batch


def tokens_per_second(engine: ChunkEngine, work: Work) -> float | None:
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
    compute_batch(
        engine, Batch(largest.behind, tried.keys[:1])
    )  # what stands before is computed once
    began = time.perf_counter()
    compute_batch(engine, tried)
    return tried.tokens / (time.perf_counter() - began)
