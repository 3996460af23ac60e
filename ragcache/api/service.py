"""The service behind the routes: one model, one store per tenant, and their scheduler.

Each tenant has a store of its own, below the folder of the service's store. Its documents, KV,
vector index and RAM tier are shared with no other tenant, so neither its answers nor their timing
depend on another tenant's data. The model and the embedder are loaded once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

from ragcache.api.future_chain import chain_futures
from ragcache.api.quality_monitor import QualityMonitor
from ragcache.api.scheduler import PENDING, Scheduler
from ragcache.api.ticket_queue import EventCallback, Ticket
from ragcache.core.indexing import Added, Split, check_bytes
from ragcache.core.precompute import Precomputed, iter_precompute
from ragcache.core.request import Request, RetrieveOptions
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.key import ChunkKey
from ragcache.store.tenants import make_tenant_folder
from ragcache.types import Answer, Chunk, Document, Passage

_T = TypeVar("_T")
_R = TypeVar("_R")

#: Chunks to embed, and tokens whose KV is computed, in one step of adding documents. A request
#: waits for at most one such step.
EMBED_BATCH, BATCH_TOKENS = 16, 256


class Service:
    """The tenants' stores below that of ``default_cache``, and one engine for all. Thread-safe.

    The tenant "" owns the store in that folder itself (``default_cache``); without API keys it is
    the only tenant. :mod:`ragcache.store.tenants` says which names others may have. Their stores
    are made on first use and stay open, with a RAM tier of ``ram_bytes`` each: there are
    as many of them as tenants have API keys.

    Nothing is prefetched for a request that waits. Its layers are read while earlier layers
    compute; reading sooner would compete for Python's lock with the answer in progress.
    """

    def __init__(
        self,
        default_cache: RagCache,
        scheduler: Scheduler,
        quality_monitor: QualityMonitor | None = None,
        settings: ServiceSettings | None = None,
    ) -> None:
        self.default_cache, self.scheduler = default_cache, scheduler
        self.settings = settings or ServiceSettings.load()
        #: For long work that needs no engine: splitting documents.
        self.split_scheduler = Scheduler(name="splitter")
        self.quality_monitor = quality_monitor  # None: answers are not compared with full prefill
        self.on_drained: list[Callable[[], None]] = []  # called once all work has ended
        self._caches = {"": default_cache}
        self._lock = threading.Lock()  # of the two dicts; never held while a store is opened
        self._opening: dict[str, threading.Lock] = {}

    @classmethod
    def open(
        cls,
        settings: Settings,
        service: ServiceSettings,
        *,
        loading: Callable[[str], None] | None = None,
    ) -> Self:
        """Open the default store, and with it the model.

        ``loading`` is called with the model's name before it is loaded. With a ``monitor_share`` of
        0 there is no quality monitor. Raises what :meth:`RagCache.open` raises.
        """
        share, floor = service.monitor_share, service.monitor_floor
        cache = RagCache.open(settings.store, settings=settings, loading=loading)
        monitored = share and settings.engine == "embedded"  # a vLLM server returns no logits
        monitor = QualityMonitor(settings, share=share, floor=floor) if monitored else None
        scheduler = Scheduler(queue=service.queue, streams=service.streams)
        return cls(cache, scheduler, monitor, service)

    def cache(self, tenant: str) -> RagCache:
        """The tenant's RagCache, opened on first use. Raises ConfigError for an invalid name."""
        with self._lock:
            opening = self._opening.setdefault(tenant, threading.Lock())
        with opening:
            with self._lock:
                if (known := self._caches.get(tenant)) is not None:
                    return known
            settings = self.default_cache.settings
            path = make_tenant_folder(Path(settings.store), tenant)
            cache = RagCache.open(path, settings=settings, beside=self.default_cache, tenant=tenant)
            with self._lock:
                self._caches[tenant] = cache
            return cache

    def submit(
        self,
        tenant: str,
        request: Request,
        on_event: EventCallback,
        *,
        seconds: float | None = None,
        on_no_chunks: Callable[[str], None] | None = None,
    ) -> Ticket:
        """Queue a request. ``on_event`` receives the pieces of the answer's text, then the Answer.

        If the prompt has no chunks, ``on_no_chunks`` is called with the reason before the first
        piece, on the engine's thread. Raises QueueFull or ShuttingDown; every other error is an
        event.
        """

        def run(check: Callable[[], None]) -> Iterator[object]:
            cache, monitor = self.cache(tenant), self.quality_monitor
            adjusted = request if monitor is None else monitor.adjust(request)
            note = None if monitor is None else monitor.note(request)
            with closing(cache.generate(replace(adjusted, check=check, keep=False))) as stream:
                if stream.no_chunks is not None and on_no_chunks is not None:
                    on_no_chunks(stream.no_chunks)
                for piece in stream.steps():
                    yield PENDING if piece is None else piece
                if stream.misses:
                    self.scheduler.submit_idle(stream.keep)
                if monitor is not None and (compare := monitor.sample(cache, adjusted, stream)):
                    self.scheduler.submit_idle(compare)
                yield stream.answer if note is None else _with_note(stream.answer, note)

        return self.scheduler.submit(tenant, run, on_event, seconds=seconds)

    def search(
        self,
        tenant: str,
        question: str,
        *,
        seconds: float | None = None,
        **options: Unpack[RetrieveOptions],
    ) -> Future[list[tuple[Passage, int]]]:
        """Queue :meth:`RagCache.retrieve` among the requests; each passage comes with the number of
        its document's chunks. Future and errors as for :meth:`call`.
        """

        def search(cache: RagCache) -> list[tuple[Passage, int]]:
            passages = cache.retrieve(question, **options)
            return [(p, len(cache.catalog.rows_of(p.chunk.document))) for p in passages]

        return self.call(tenant, search, seconds=seconds)

    def call(
        self, tenant: str, work: Callable[[RagCache], _T], *, seconds: float | None = None
    ) -> Future[_T]:
        """Queue ``work``, which is called with the tenant's RagCache, as one step among the
        requests.

        The future raises what ``work`` raises, or DeadlineExceeded; cancelling it cancels the
        work. Raises QueueFull or ShuttingDown.
        """
        future: Future[_T] = Future()
        results: list[_T] = []

        def run(check: Callable[[], None]) -> Iterator[object]:
            results.append(work(self.cache(tenant)))
            yield from ()

        def on_event(kind: str, value: Any) -> None:
            if future.set_running_or_notify_cancel():
                if kind == "failed":
                    future.set_exception(value)
                else:
                    future.set_result(results[0])

        ticket = self.scheduler.submit(tenant, run, on_event, seconds=seconds)
        future.add_done_callback(lambda done: ticket.cancel() if done.cancelled() else None)
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
        """Queue :meth:`RagCache.add` as background work, in small steps between which requests are
        answered and other tenants' documents are added. Splitting does not occupy the engine.

        The future raises what that raises, or DeadlineExceeded after ``seconds``; cancelling it
        keeps what is committed. Raises ShuttingDown, and QueueFull if the tenant's queue of
        background work is full.
        """
        deadline = None if seconds is None else time.monotonic() + seconds

        def split_steps() -> Generator[object, None, Split]:
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

        return self._submit_background(tenant, split_steps(), steps, deadline)

    def precompute(
        self, tenant: str, chunks: Sequence[Chunk], *, seconds: float | None = None
    ) -> Future[tuple[list[ChunkKey], Precomputed]]:
        """Queue the computation of the KV of chunks that belong to no document, without splitting
        them; the future has their keys.

        Runs in small steps and raises the same errors as :meth:`add`; also ContextError for a
        chunk that does not fit the context.
        """
        for chunk in chunks:
            check_bytes(self.default_cache.engine, chunk.text)
        deadline = None if seconds is None else time.monotonic() + seconds

        def tokenize_steps() -> Generator[object, None, list[ChunkKey]]:
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

        return self._submit_background(tenant, tokenize_steps(), steps, deadline)

    def _submit_background(
        self,
        tenant: str,
        preparation: Generator[object, None, _T],
        steps: Callable[[_T], Generator[object, None, _R]],
        deadline: float | None,
    ) -> Future[_R]:
        """Queue background work whose ``preparation`` needs no engine. Raises QueueFull or
        ShuttingDown."""

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        def then(prepared: _T) -> Future[_R]:
            return self.scheduler.submit_background(
                steps(prepared), tenant=tenant, seconds=left(), limit=sys.maxsize
            )

        room = self.scheduler.queue - self.scheduler.count_background(tenant)
        self.scheduler.check_open()
        first = self.split_scheduler.submit_background(
            preparation, tenant=tenant, seconds=left(), limit=room
        )
        return chain_futures(first, then)

    def drain(self, seconds: float) -> None:
        """Accept no more work, and finish within ``seconds`` what the engine has begun. Splitting
        is cancelled."""
        self.split_scheduler.close(0.0)
        self.scheduler.close(seconds)
        for callback in self.on_drained:
            callback()
        self.on_drained.clear()

    def caches(self) -> list[RagCache]:
        """The RagCaches that are open."""
        with self._lock:
            return list(self._caches.values())

    def close(self, seconds: float = 30.0) -> None:
        """Drain for up to ``seconds``, then close all stores."""
        try:
            self.drain(seconds)
        finally:
            with ExitStack() as stack:  # each is closed even if another fails
                for cache in self.caches():
                    stack.callback(cache.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _with_note(answer: Answer, note: str) -> Answer:
    """The answer, with ``note`` among its report's fallbacks."""
    report = answer.report
    return replace(answer, report=replace(report, fallbacks=(*report.fallbacks, note)))
