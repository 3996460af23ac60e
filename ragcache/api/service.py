"""What is behind the routes: one model, a store for every tenant, and the scheduler between them.

A tenant is a store of its own, below the folder of all: its documents, KV, vector index and tier in
RAM are shared with nobody, and so nothing that it can ask or time depends on another's. The model
and the embedder are loaded once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ragcache.api.futures import chained
from ragcache.api.quality_monitor import QualityMonitor
from ragcache.api.scheduler import WAITS, Scheduler, Ticket, Told
from ragcache.core.indexing import Added, Split, check_bytes
from ragcache.core.precompute import Precomputed, iter_precompute
from ragcache.core.request import Request
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.key import ChunkKey
from ragcache.store.tenants import make_tenant_folder
from ragcache.types import Answer, Chunk, Document, Passage

T = TypeVar("T")
R = TypeVar("R")

#: A step of adding documents: chunks that are embedded, tokens whose KV is computed. A question
#: waits for one such step at most.
EMBED_BATCH, BATCH_TOKENS = 16, 256


class Service:
    """Tenants' stores below that of ``own``, and one engine for all. Thread-safe.

    The tenant called "" has the store in that folder itself: it is the only one where no keys are
    asked for. Others are called as :mod:`ragcache.store.tenants` says, and made on first use. They
    stay open, with a tier of ``ram_bytes`` each: there are as many of them as somebody
    gave keys to.

    Nothing is read ahead for a question that waits. Its layers are read while earlier ones compute,
    by threads that share Python's lock with the answer that is under way.
    """

    def __init__(
        self,
        own: RagCache,
        scheduler: Scheduler,
        guard: QualityMonitor | None = None,
        settings: ServiceSettings | None = None,
    ) -> None:
        self.own, self.scheduler = own, scheduler
        self.settings = settings or ServiceSettings.load()
        #: For what is long and needs no engine: splitting, in turns too.
        self.aside = Scheduler(name="splitter")
        self.guard = guard  # None: nobody compares answers with full prefill
        self.ends: list[Callable[[], None]] = []  # told when nothing is done any more
        self._caches = {"": own}
        self._lock = threading.Lock()  # of what is known; never held while a store is opened
        self._opening: dict[str, threading.Lock] = {}

    @classmethod
    def open(
        cls,
        settings: Settings,
        service: ServiceSettings,
        *,
        loading: Callable[[str], None] | None = None,
    ) -> Self:
        """``loading`` is told the model's name before it is loaded. Raises what
        :meth:`RagCache.open` raises."""
        share, floor = service.monitor_share, service.monitor_floor
        own = RagCache.open(settings.store, settings=settings, loading=loading)
        watched = share and settings.engine == "embedded"  # a server hands no logits over
        guard = QualityMonitor(settings, share=share, floor=floor) if watched else None
        scheduler = Scheduler(queue=service.queue, streams=service.streams)
        return cls(own, scheduler, guard, service)

    def cache(self, tenant: str) -> RagCache:
        """The tenant's own RagCache. ConfigError for a name that is not valid."""
        with self._lock:
            opening = self._opening.setdefault(tenant, threading.Lock())
        with opening:
            with self._lock:
                if (known := self._caches.get(tenant)) is not None:
                    return known
            path = make_tenant_folder(Path(self.own.settings.store), tenant)
            cache = RagCache.open(path, settings=self.own.settings, beside=self.own, tenant=tenant)
            with self._lock:
                self._caches[tenant] = cache
            return cache

    def ask(
        self,
        tenant: str,
        ask: Request,
        told: Told,
        *,
        seconds: float | None = None,
        without: Callable[[str], None] | None = None,
    ) -> Ticket:
        """Queue a question. It is told pieces of the answer's text, and the Answer last.

        ``without`` is called before the first piece, on the engine's thread, where the prompt has
        no chunks, and told why.
        Raises Busy or Closing, and nothing else: what is wrong with the question is told.
        """

        def run(check: Callable[[], None]) -> Iterator[object]:
            cache, guard = self.cache(tenant), self.guard
            given = ask if guard is None else guard.adjust(ask)
            note = None if guard is None else guard.sentence(ask)
            stream = cache.generate(replace(given, check=check, keep=False))
            if stream.no_chunks is not None and without is not None:
                without(stream.no_chunks)
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
        of its document's chunks. Future and errors as for :meth:`turn`.
        """

        def found(cache: RagCache) -> list[tuple[Passage, int]]:
            passages = cache.retrieve(question, top_k, neighbours)
            return [(p, len(cache.catalog.rows_of(p.chunk.document))) for p in passages]

        return self.turn(tenant, found, seconds=seconds)

    def turn(
        self, tenant: str, work: Callable[[RagCache], T], *, seconds: float | None = None
    ) -> Future[T]:
        """Do this with the tenant's own RagCache, in one step, in its turn among the questions.

        The future raises what ``work`` raises, or TooLate; cancelled, it gives the work up. Raises
        Busy or Closing.
        """
        future: Future[T] = Future()
        made: list[T] = []

        def run(check: Callable[[], None]) -> Iterator[object]:
            made.append(work(self.cache(tenant)))
            yield from ()

        def told(kind: str, value: Any) -> None:
            if future.set_running_or_notify_cancel():
                if kind == "failed":
                    future.set_exception(value)
                else:
                    future.set_result(made[0])

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
        seconds: float | None = None,
    ) -> Future[Added]:
        """:meth:`RagCache.add` in small steps, between which others' questions are answered, and
        others' documents are added. Documents are split aside from the engine.

        The future raises what that raises, or TooLate after ``seconds``; cancelled, it leaves what
        was committed. Raises Closing, and Busy where as many of the tenant's wait as may.
        """
        deadline = None if seconds is None else time.monotonic() + seconds

        def splitting() -> Generator[object, None, Split]:
            return (yield from self.cache(tenant).indexing.iter_split(documents))

        def steps(split: Split) -> Generator[object, None, Added]:
            return (
                yield from self.cache(tenant).indexing.iter_add(
                    documents,
                    ttl_s=ttl_s,
                    pinned=pinned,
                    split=split,
                    embed_batch=EMBED_BATCH,
                    batch_tokens=BATCH_TOKENS,
                )
            )

        return self._work(tenant, splitting(), steps, deadline)

    def compute(
        self, tenant: str, chunks: Sequence[Chunk], *, seconds: float | None = None
    ) -> Future[tuple[list[ChunkKey], Precomputed]]:
        """Compute and store the KV of chunks that no document has, each whole; their keys.

        In small steps, as :meth:`add`, and it raises what that raises. ContextError for a chunk
        that cannot fit.
        """
        for chunk in chunks:
            check_bytes(self.own.engine, chunk.text)
        deadline = None if seconds is None else time.monotonic() + seconds

        def tokenizing() -> Generator[object, None, list[ChunkKey]]:
            keys, cache = list[ChunkKey](), self.cache(tenant)
            for chunk in chunks:
                keys.append(cache.indexing.key(chunk))
                yield None
            return keys

        def steps(
            keys: list[ChunkKey],
        ) -> Generator[object, None, tuple[list[ChunkKey], Precomputed]]:
            cache = self.cache(tenant)
            done = yield from iter_precompute(
                cache.engine, cache.chunks, keys, batch_tokens=BATCH_TOKENS
            )
            return keys, done

        return self._work(tenant, tokenizing(), steps, deadline)

    def _work(
        self,
        tenant: str,
        before: Generator[object, None, T],
        steps: Callable[[T], Generator[object, None, R]],
        deadline: float | None,
    ) -> Future[R]:
        """Work whose first part needs no engine. Raises Busy or Closing."""

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        def then(found: T) -> Future[R]:
            return self.scheduler.background(
                steps(found), tenant=tenant, seconds=left(), most=sys.maxsize
            )

        room = self.scheduler.queue - self.scheduler.works_of(tenant)
        self.scheduler.check_open()
        first = self.aside.background(before, tenant=tenant, seconds=left(), most=room)
        return chained(first, then)

    def drain(self, seconds: float) -> None:
        """Take nothing more, and finish within ``seconds`` what the engine has begun. Documents
        that are being split are left."""
        self.aside.close(0.0)
        self.scheduler.close(seconds)
        for end in self.ends:
            end()
        self.ends.clear()

    def caches(self) -> list[RagCache]:
        """Those that are open."""
        with self._lock:
            return list(self._caches.values())

    def close(self, seconds: float = 30.0) -> None:
        """Finish what was begun, for so long; then close all stores."""
        try:
            self.drain(seconds)
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
