"""Documents that are added, or whose KV is computed, in the background: a batch between questions.

A job's documents are split aside, and then it takes its steps on the engine's thread: one batch of
chunks is embedded, or computed, then whatever waits goes first again. So it delays no first token
by more than a batch, and cancelling it takes effect at the next one. Tenants take turns, batch by
batch; of one tenant's jobs the oldest is done first.

What a job needs to be taken up again, by this process or the next, is in its tenant's own store: a
record, and the texts of its documents until all of them are committed there; of a job that indexes
nothing, until it is done. Chunks that have been
computed need no record, since what is stored is not computed again. Which tenants have something to
take up is noted in the service's own store.

A job's documents are written, in the order of writes, when it is taken: what is put or deleted
after that stands, whenever the job comes to it, by :meth:`Catalog.promise`.

A job that was under way when the process ended, without getting anywhere, is tried
:data:`ATTEMPTS` times in all, and then parked: the next process would end too.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ragcache.api.scheduler import Busy, Closing, GivenUp
from ragcache.api.service import BATCH_TOKENS, EMBED_BATCH, Service
from ragcache.batch.plan import Work as OfflineWork
from ragcache.batch.plan import planning
from ragcache.batch.run import Finished, finishing
from ragcache.core.indexing import Added, Split, Step, check_documents
from ragcache.core.precompute import Precomputed
from ragcache.errors import ConfigError, RagCacheError
from ragcache.types import Document

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "cancelled", "failed", "parked"]

KEPT = 100  # jobs of a tenant that have ended and are still listed
MOST = 100  # jobs of a tenant that have not ended; their texts are on the disk
ATTEMPTS = 3
_AGAIN_S = 10.0  # after which one more may have ended
_RECORD, _TEXTS, _UNFINISHED = "job:", "job-texts:", "jobs-of:"


@dataclass(frozen=True, slots=True)
class Job:
    """Where a job is. ``done`` of ``total`` documents while they are indexed, then of chunks that
    are computed; times are seconds since the epoch."""

    id: str
    tenant: str
    state: State
    done: int = 0
    total: int = 0
    message: str = ""  # what is being done, or what was, or what went wrong
    created: float = 0.0
    finished: float | None = None


@dataclass(eq=False, slots=True)
class _Work:
    """A job, and what it takes to do it."""

    job: Job
    documents: list[str]  # ids
    expires: float | None
    pinned: bool | None
    index: bool  # else their KV is computed, and nothing more
    promise: int | None  # to write the documents; None where nothing is indexed
    attempts: int = 0  # of processes to get anywhere with it, this one included
    before: Future[Split | OfflineWork | None] | None = field(default=None, repr=False)
    steps: Generator[Step, None, Added | Precomputed | Finished] | None = field(
        default=None, repr=False
    )

    @property
    def open(self) -> bool:
        return self.job.state in ("queued", "running")


class Jobs:
    """The jobs of all tenants of a service; those that an earlier process left go on. Thread-safe.

    They stop with the service's scheduler, and are not lost.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.RLock()
        self._tenants: dict[str, dict[str, _Work]] = {}  # in the order of their turns
        self._going = False
        self._at: _Work | None = None  # whose step is being taken
        service.ends.append(self._leave)
        for name in service.own.catalog.settings(_UNFINISHED):
            tenant = name.removeprefix(_UNFINISHED)
            try:
                self._of(tenant)
            except RagCacheError:
                logger.exception("jobs of tenant %r cannot be taken up", tenant)
        self._go()

    def add(
        self,
        tenant: str,
        documents: Sequence[Document],
        ttl_s: float | None = None,
        pinned: bool | None = None,
        *,
        index: bool = True,
    ) -> Job:
        """Add documents, as :meth:`RagCache.add` does; durable on return, done later.

        Without ``index`` their chunks' KV is computed as ``ragcache precompute`` does, for those
        who find chunks by other means; nothing is kept of the documents.
        Raises SourceError and ConfigError as that does, StoreError, and Busy where :data:`MOST` of
        the tenant's have not ended.
        """
        check_documents(documents, ttl_s)
        if not index and (ttl_s is not None or pinned is not None):
            raise ConfigError(
                "ttl_s and pinned are kept with documents, and none are kept without index: leave "
                "them out"
            )
        now = time.time()
        job = Job(uuid.uuid4().hex[:16], tenant, "queued", total=len(documents), created=now)
        expires = None if ttl_s is None else now + ttl_s
        names = [d.id for d in documents]
        texts = json.dumps([[d.id, d.text, dict(d.metadata)] for d in documents])
        with self._lock:
            works = self._of(tenant)
            if (waiting := sum(other.open for other in works.values())) >= MOST:
                raise Busy(waiting, _AGAIN_S, "jobs")
            catalog = self._service.cache(tenant).catalog
            promise = catalog.promise(names) if index else None
            work = _Work(job, names, expires, pinned, index, promise)
            catalog.put_text(_TEXTS + job.id, texts)
            self._service.own.catalog.put_setting(_UNFINISHED + tenant, "")
            self._record(work)
            works[job.id] = work
            self._forget_old(tenant)
            self._go()
        return job

    def list(self, tenant: str) -> list[Job]:
        """The oldest first. Of those that have ended, the last :data:`KEPT`."""
        with self._lock:
            return [work.job for work in self._of(tenant).values()]

    def get(self, tenant: str, id: str) -> Job:
        """Raises KeyError."""
        with self._lock:
            return self._of(tenant)[id].job

    def cancel(self, tenant: str, id: str) -> Job:
        """End it at the next batch; what is done stays. One that has ended is left as it is. Raises
        KeyError."""
        with self._lock:
            work = self._of(tenant)[id]
            if work.open:
                self._end(work, "cancelled", work.job.message)
            return work.job

    def resume(self, tenant: str, id: str) -> Job:
        """Go on with one that was cancelled, has failed or was parked; any other is left as it is.
        Raises KeyError."""
        with self._lock:
            work = self._of(tenant)[id]
            if work.job.state in ("cancelled", "failed", "parked"):
                work.attempts = 0
                work.job = replace(work.job, state="queued", message="", finished=None)
                self._service.own.catalog.put_setting(_UNFINISHED + tenant, "")
                self._record(work)
                self._go()
            return work.job

    def _of(self, tenant: str) -> dict[str, _Work]:
        """A tenant's jobs by id, the oldest first, read from its store at the first time."""
        if tenant not in self._tenants:
            catalog = self._service.cache(tenant).catalog
            works = [_from_json(text) for text in catalog.settings(_RECORD).values()]
            works.sort(key=lambda work: work.job.created)
            catalog.withdraw_others({work.promise for work in works if work.promise is not None})
            for work in works:  # of an earlier release
                if work.index and work.promise is None and work.job.state != "done":
                    work.promise = catalog.promise(work.documents)
                    self._record(work)
            self._tenants[tenant] = {work.job.id: work for work in works}
            for work in works:
                if work.open and work.attempts >= ATTEMPTS:
                    self._end(
                        work,
                        "parked",
                        f"the process has ended {work.attempts} times while this was under way: "
                        "see its log; resume the job to try once more",
                    )
        return self._tenants[tenant]

    def _go(self) -> None:
        if not self._going and self._next() is not None:
            self._going = True
            self._service.scheduler.meanwhile(self._step)

    def _next(self) -> _Work | None:
        """The oldest job of the tenant whose turn it is, of those that wait for nothing else."""
        for one in self._tenants.values():
            work = next((work for work in one.values() if work.open), None)
            if work is not None and (work.before is None or work.before.done()):
                return work
        return None

    def _step(self) -> bool:
        """One batch; whether there is more to do."""
        with self._lock:
            work = self._next()
            self._going = work is not None
            if work is None:
                return False
            tenant = work.job.tenant
            self._tenants[tenant] = self._tenants.pop(tenant)  # its next turn is after all others'
            work.job = replace(work.job, state="running")
            self._at = work
        try:
            if work.before is None:
                self._begin(work)
                return True
            if work.steps is None:
                work.steps = self._steps(work, work.before.result())
            what, done, total = next(work.steps)
        except StopIteration as end:
            self._ended(work, "done", _summary(end.value))
        except (Closing, GivenUp, CancelledError) as error:  # all ends; or it was cancelled
            with self._lock:
                self._at = work.before = None
                self._going = isinstance(error, CancelledError)
            return self._going
        except RagCacheError as error:
            self._ended(work, "failed", str(error))
        except Exception:
            logger.exception("job %s has failed", work.job.id)
            self._ended(work, "failed", "an internal error: see the log")
        else:
            with self._lock:
                self._at = None
                if work.open:
                    work.job = replace(work.job, done=done, total=total, message=what)
                    if done and work.attempts and what in ("index", "precompute"):
                        work.attempts = 0  # it got somewhere
                        self._record(work)
                else:  # cancelled meanwhile
                    work.steps = work.before = None
        return True

    def _begin(self, work: _Work) -> None:
        """Have the documents split, or what is to be computed planned."""
        with self._lock:
            self._at = None
            if not work.open:  # cancelled meanwhile
                return
            work.before = before = self._service.aside.background(
                self._before(work), tenant=work.job.tenant, most=sys.maxsize
            )
        before.add_done_callback(self._split)

    def _split(self, _: object) -> None:
        with self._lock:
            self._go()

    def _before(self, work: _Work) -> Generator[Step, None, Split | OfflineWork | None]:
        """On the thread aside: see :meth:`_begin`. None where the texts are not needed any more.

        An attempt is counted here, and not of what only waits while another ends the process.
        """
        with self._lock:
            work.attempts += 1
            self._record(work)
        cache = self._service.cache(work.job.tenant)
        texts = cache.catalog.get_text(_TEXTS + work.job.id)
        if texts is None and work.index:
            return None
        given = [Document(*fields) for fields in json.loads(texts or "[]")]
        if work.promise is None:
            return (yield from planning(cache, given, batch_tokens=BATCH_TOKENS))
        stands = set(cache.catalog.promised(work.promise, work.documents))
        return (yield from cache.indexing.iter_split(d for d in given if d.id in stands))

    def _leave(self) -> None:
        """The process ends in order: that is nobody's fault."""
        with self._lock:
            for one in self._tenants.values():
                for work in one.values():
                    if work.open and work.attempts:
                        work.attempts = 0
                        self._record(work)

    def _steps(
        self, work: _Work, before: Split | OfflineWork | None
    ) -> Generator[Step, None, Added | Precomputed | Finished]:
        """Index the documents, unless that was done, or is not to be; then compute."""
        cache, name = self._service.cache(work.job.tenant), _TEXTS + work.job.id
        if isinstance(before, OfflineWork):
            finished = yield from finishing(cache, before)
            cache.catalog.drop_text(name)
            return finished
        texts = cache.catalog.get_text(name)
        if texts is None:
            return (
                yield from cache.indexing.iter_compute(work.documents, batch_tokens=BATCH_TOKENS)
            )
        steps = cache.indexing.iter_add(
            [Document(*fields) for fields in json.loads(texts)],
            ttl_s=None if work.expires is None else max(1e-3, work.expires - time.time()),
            pinned=work.pinned,
            promise=work.promise,
            split=before,
            embed_batch=EMBED_BATCH,
            batch_tokens=BATCH_TOKENS,
        )
        indexed = False
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                added: Added = end.value
                return added
            if step[0] == "precompute" and not indexed:
                indexed = cache.catalog.drop_text(name)
            yield step

    def _ended(self, work: _Work, state: State, message: str) -> None:
        with self._lock:
            self._at = work.steps = work.before = None
            if work.open or state == "done":
                try:
                    self._end(work, state, message)
                except RagCacheError:
                    logger.exception("the end of job %s is not recorded", work.job.id)

    def _end(self, work: _Work, state: State, message: str) -> None:
        tenant, own = work.job.tenant, self._service.own.catalog
        work.job = replace(work.job, state=state, message=message, finished=time.time())
        if work.before is not None:
            work.before.cancel()
        if work is not self._at:
            work.steps = work.before = None
        self._record(work)
        if not any(other.open for other in self._of(tenant).values()):
            own.drop_setting(_UNFINISHED + tenant)

    def _record(self, work: _Work) -> None:
        known = {
            "job": asdict(work.job),
            "documents": work.documents,
            "expires": work.expires,
            "pinned": work.pinned,
            "index": work.index,
            "promise": work.promise,
            "attempts": work.attempts,
        }
        catalog = self._service.cache(work.job.tenant).catalog
        catalog.put_setting(_RECORD + work.job.id, json.dumps(known))

    def _forget_old(self, tenant: str) -> None:
        ended = [id for id, work in self._of(tenant).items() if not work.open]
        for id in ended[: max(0, len(ended) - KEPT)]:
            work = self._of(tenant)[id]
            catalog = self._service.cache(tenant).catalog
            if work.promise is not None:
                catalog.withdraw(work.promise, work.documents)
            catalog.drop_text(_TEXTS + id)
            catalog.drop_setting(_RECORD + id)
            del self._of(tenant)[id]


def _from_json(text: str) -> _Work:
    known: dict[str, Any] = json.loads(text)
    return _Work(
        Job(**known["job"]),
        known["documents"],
        known["expires"],
        known["pinned"],
        known.get("index", True),  # of an earlier release, as the next
        known.get("promise"),
        known.get("attempts", 0),
    )


def _summary(done: Added | Precomputed | Finished) -> str:
    if isinstance(done, Finished):
        return done.summary()
    computed = done.precomputed if isinstance(done, Added) else done
    kv = f"KV of {computed.encoded} chunks computed, {computed.stored} were there"
    if isinstance(done, Precomputed):
        return kv
    overtaken = f", {done.overtaken} left out: written or deleted since" if done.overtaken else ""
    return f"{done.documents} documents indexed, {done.unchanged} unchanged{overtaken}; {kv}"
