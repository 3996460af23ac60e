"""What is behind the routes: one model, a store for every tenant, and the scheduler between them.

A tenant is a store of its own, below the folder of all: its documents, KV, vector index and tier in
RAM are shared with nobody, and so nothing that it can ask or time depends on another's. The model
and the embedder are loaded once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ragcache.api.guard import Guard
from ragcache.api.scheduler import WAITS, Scheduler, Ticket, Told
from ragcache.indexing import Added
from ragcache.pipeline import RagCache
from ragcache.precompute import Precomputed, precomputing
from ragcache.settings import Ratio, Settings
from ragcache.store.key import ChunkKey
from ragcache.store.tenants import tenant_folder
from ragcache.types import Answer, Chunk, Document, Passage, Sampling

#: A step of adding documents: chunks that are embedded, tokens whose KV is computed. A question
#: waits for one such step at most.
EMBED_BATCH, BATCH_TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class Ask:
    """A question as it comes to the service. What is None comes from the settings."""

    question: str
    chunks: Sequence[Chunk] | Sequence[Passage] | None = None  # instead of retrieval
    lead: str = ""  # instructions and earlier turns
    mode: str | None = None
    ratio: Ratio | None = None
    top_k: int | None = None
    neighbours: int | None = None
    sampling: Sampling | None = None


class Service:
    """Tenants' stores below ``settings.store``, and one engine for all. Thread-safe.

    The tenant called "" has the store in that folder itself: it is the only one where no keys are
    asked for. Others are called as :mod:`ragcache.store.tenants` says, and made on first use. They
    stay open, with a tier of ``settings.ram_bytes`` each: there are as many of them as somebody
    gave keys to.

    Nothing is read ahead for a question that waits. Its layers are read while earlier ones compute,
    by threads that share Python's lock with the answer that is under way.
    """

    def __init__(self, own: RagCache, scheduler: Scheduler, guard: Guard | None = None) -> None:
        self.own, self.scheduler, self.settings = own, scheduler, own.settings
        self.guard = guard  # None: nobody compares answers with full prefill
        self._caches = {"": own}
        self._lock = threading.Lock()  # of what is known; never held while a store is opened
        self._opening: dict[str, threading.Lock] = {}

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        queue: int = 64,
        streams: int = 16,
        guard_share: float | None = None,
        guard_floor: float | None = None,
    ) -> Self:
        """Raises what :meth:`RagCache.open` raises. What the guard is not given comes from the
        settings; with a share of 0 there is none."""
        share = settings.guard_share if guard_share is None else guard_share
        floor = settings.guard_floor if guard_floor is None else guard_floor
        own = RagCache.open(settings.store, settings=settings)
        watched = share and settings.engine == "embedded"  # a server hands no logits over
        guard = Guard(settings, share=share, floor=floor) if watched else None
        return cls(own, Scheduler(queue=queue, streams=streams), guard)

    def cache(self, tenant: str) -> RagCache:
        """The tenant's own RagCache. ConfigError for a name that is not valid."""
        path = tenant_folder(Path(self.settings.store), tenant)
        with self._lock:
            opening = self._opening.setdefault(tenant, threading.Lock())
        with opening:
            with self._lock:
                if (known := self._caches.get(tenant)) is not None:
                    return known
            path.parent.mkdir(mode=0o700, exist_ok=True)
            cache = RagCache.open(path, settings=self.settings, beside=self.own, tenant=tenant)
            with self._lock:
                self._caches[tenant] = cache
            return cache

    def ask(self, tenant: str, ask: Ask, told: Told, *, seconds: float | None = None) -> Ticket:
        """Queue a question. It is told pieces of the answer's text, and the Answer last.

        Raises Busy or Closing, and nothing else: what is wrong with the question is told.
        """

        def run(check: Callable[[], None]) -> Iterator[object]:
            cache, guard = self.cache(tenant), self.guard
            given = ask if guard is None else guard.adjust(ask)
            note = None if guard is None else guard.sentence(ask)
            stream = cache.stream(
                given.question,
                mode=given.mode,
                ratio=given.ratio,
                top_k=given.top_k,
                neighbours=given.neighbours,
                chunks=given.chunks,
                lead=given.lead,
                sampling=given.sampling,
                check=check,
                keep=False,
            )
            for piece in stream.steps():
                yield WAITS if piece is None else piece
            if stream.misses:
                self.scheduler.later(stream.keep)
            if guard is not None and (compare := guard.sample(cache, given, stream)):
                self.scheduler.later(compare)
            yield stream.answer if note is None else _noted(stream.answer, note)

        return self.scheduler.submit(tenant, run, told, seconds=seconds)

    def search(
        self,
        tenant: str,
        question: str,
        *,
        top_k: int | None = None,
        neighbours: int | None = None,
        seconds: float | None = None,
    ) -> Future[list[tuple[Passage, int]]]:
        """:meth:`RagCache.retrieve` in its turn among the questions; each passage with the number
        of its document's chunks.

        The future raises what that raises, or TooLate; cancelled, it gives the search up. Raises
        Busy or Closing.
        """
        future: Future[list[tuple[Passage, int]]] = Future()
        found: list[tuple[Passage, int]] = []

        def run(check: Callable[[], None]) -> Iterator[tuple[Passage, int]]:
            cache = self.cache(tenant)
            for passage in cache.retrieve(question, top_k, neighbours):
                found.append((passage, len(cache.catalog.rows_of(passage.chunk.document))))
            yield from ()

        def told(kind: str, value: Any) -> None:
            if future.set_running_or_notify_cancel():
                if kind == "failed":
                    future.set_exception(value)
                else:
                    future.set_result(found)

        ticket = self.scheduler.submit(tenant, run, told, seconds=seconds)
        future.add_done_callback(lambda done: ticket.give_up() if done.cancelled() else None)
        return future

    def add(
        self,
        tenant: str,
        documents: Sequence[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
    ) -> Future[Added]:
        """:meth:`RagCache.add` in small steps, between which others' questions are answered.

        The future raises what that raises; cancelled, it leaves what was committed.
        """

        def steps() -> Generator[object, None, Added]:
            return (
                yield from self.cache(tenant).indexing.adding(
                    documents,
                    ttl_s=ttl_s,
                    pinned=pinned,
                    embed_batch=EMBED_BATCH,
                    batch_tokens=BATCH_TOKENS,
                )
            )

        return self.scheduler.background(steps())

    def compute(
        self, tenant: str, chunks: Sequence[Chunk]
    ) -> Future[tuple[list[ChunkKey], Precomputed]]:
        """Compute and store the KV of chunks that no document has, each whole; their keys.

        In small steps, as :meth:`add`.
        """

        def steps() -> Generator[object, None, tuple[list[ChunkKey], Precomputed]]:
            cache = self.cache(tenant)
            keys = [cache.indexing.key(chunk) for chunk in chunks]
            done = yield from precomputing(
                cache.engine, cache.chunks, keys, batch_tokens=BATCH_TOKENS
            )
            return keys, done

        return self.scheduler.background(steps())

    def caches(self) -> list[RagCache]:
        """Those that are open."""
        with self._lock:
            return list(self._caches.values())

    def close(self, seconds: float = 30.0) -> None:
        """Finish what was begun, for so long; then close all stores."""
        try:
            self.scheduler.close(seconds)
        finally:
            with ExitStack() as every:  # each is closed whatever becomes of the others
                for cache in self.caches():
                    every.callback(cache.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _noted(answer: Answer, note: str) -> Answer:
    """The answer, with one more sentence in its report."""
    report = answer.report
    return replace(answer, report=replace(report, fallbacks=(*report.fallbacks, note)))
