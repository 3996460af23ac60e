"""Jobs that add documents, or compute their KV, in the background, one batch between requests.

A job's documents are split on the splitter's thread. Then it takes its steps on the engine's
thread: one batch of chunks is embedded or computed, then waiting requests go first again. So a job
delays a first token by at most one batch, and cancelling it takes effect at the next batch. Tenants
take turns batch by batch, and each tenant's oldest job is done first.

All that is needed to continue a job, in this process or the next, is in its tenant's store: a
record, and the texts of its documents until all of them are committed, or, if the job indexes
nothing, until it is done. Computed chunks need no record, since stored KV is not computed again.
The default store lists the tenants that have unfinished jobs.

In the order of writes a job's documents come when the job is accepted: a later put or delete of the
same documents wins, whenever the job reaches them (:meth:`Catalog.promise`).

A job that was running when the process ended, and had made no progress, is tried :data:`ATTEMPTS`
times in all and then parked, since it may be what ends the process.
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

from ragcache.api.service import BATCH_TOKENS, EMBED_BATCH, Service
from ragcache.api.ticket_queue import QueueFull, RequestCancelled, ShuttingDown
from ragcache.batch.plan import PrecomputePlan as BatchPlan
from ragcache.batch.plan import iter_plan
from ragcache.batch.run import PrecomputeResult, iter_run_locally
from ragcache.core.indexing import Added, Split, Step, check_documents
from ragcache.core.precompute import Precomputed
from ragcache.errors import ConfigError, RagCacheError
from ragcache.types import Document

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "cancelled", "failed", "parked"]

MAX_ENDED = 100  # ended jobs of a tenant that are still listed
MAX_OPEN = 100  # unfinished jobs of a tenant, whose texts are on disk
ATTEMPTS = 3
_RETRY_AFTER_S = 10.0  # where a tenant has too many jobs
_RECORD, _TEXTS, _UNFINISHED = "job:", "job-texts:", "jobs-of:"


@dataclass(frozen=True, slots=True)
class Job:
    """The state of a job. ``done`` of ``total`` counts documents while they are indexed, then
    chunks while they are computed; times are seconds since the epoch."""

    id: str
    tenant: str
    state: State
    done: int = 0
    total: int = 0
    message: str = ""  # the current step, the result, or the error
    created: float = 0.0
    finished: float | None = None


@dataclass(eq=False, slots=True)
class _JobRecord:
    """A job with its inputs and its progress."""

    job: Job
    documents: list[str]  # ids
    expires: float | None
    pinned: bool | None
    index: bool  # false: only compute their KV
    promise: int | None  # its place in the order of writes; None if nothing is indexed
    attempts: int = 0  # processes that began it without progress, this one included
    preparation: Future[Split | BatchPlan | None] | None = field(default=None, repr=False)
    steps: Generator[Step, None, Added | Precomputed | PrecomputeResult] | None = field(
        default=None, repr=False
    )

    @property
    def open(self) -> bool:
        return self.job.state in ("queued", "running")


class Jobs:
    """The jobs of all tenants of a service. Those that an earlier process left are continued.
    Thread-safe.

    Jobs stop with the service's scheduler and continue in the next process.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.RLock()
        self._tenants: dict[str, dict[str, _JobRecord]] = {}  # in the order of their turns
        self._scheduled = False
        self._running: _JobRecord | None = None  # the job whose step is running
        service.on_drained.append(self._reset_attempts)
        for name in service.default_cache.catalog.settings(_UNFINISHED):
            tenant = name.removeprefix(_UNFINISHED)
            try:
                self._of(tenant)
            except RagCacheError:
                logger.exception("the jobs of tenant %r cannot be continued", tenant)
        self._schedule()

    def add(
        self,
        tenant: str,
        documents: Sequence[Document],
        ttl_s: float | None = None,
        pinned: bool | None = None,
        *,
        index: bool = True,
    ) -> Job:
        """Create a job that adds documents as :meth:`RagCache.add` does. The job is durable on
        return.

        Without ``index`` it only computes their chunks' KV, as ``ragcache precompute`` does, for
        clients with a retriever of their own; the documents are not kept. Raises SourceError and
        ConfigError as :meth:`RagCache.add` does, StoreError, and QueueFull if :data:`MAX_OPEN` of
        the tenant's jobs have not ended.
        """
        check_documents(documents, ttl_s)
        if not index and (ttl_s is not None or pinned is not None):
            raise ConfigError(
                "ttl_s and pinned apply to documents, and without index no documents are kept: "
                "leave them out"
            )
        now = time.time()
        job = Job(uuid.uuid4().hex[:16], tenant, "queued", total=len(documents), created=now)
        expires = None if ttl_s is None else now + ttl_s
        names = [d.id for d in documents]
        texts = json.dumps([[d.id, d.text, dict(d.metadata)] for d in documents])
        with self._lock:
            records = self._of(tenant)
            if (waiting := sum(other.open for other in records.values())) >= MAX_OPEN:
                raise QueueFull(waiting, _RETRY_AFTER_S, "jobs")
            catalog = self._service.cache(tenant).catalog
            promise = catalog.promise(names) if index else None
            record = _JobRecord(job, names, expires, pinned, index, promise)
            catalog.put_text(_TEXTS + job.id, texts)
            self._service.default_cache.catalog.put_setting(_UNFINISHED + tenant, "")
            self._save(record)
            records[job.id] = record
            self._delete_old(tenant)
            self._schedule()
        return job

    def list(self, tenant: str) -> list[Job]:
        """A tenant's jobs, the oldest first; of ended ones, the last :data:`MAX_ENDED`."""
        with self._lock:
            return [record.job for record in self._of(tenant).values()]

    def get(self, tenant: str, id: str) -> Job:
        """Raises KeyError."""
        with self._lock:
            return self._of(tenant)[id].job

    def cancel(self, tenant: str, id: str) -> Job:
        """Stop a job at its next batch; what it has done is kept. A job that has ended is left as
        it is. Raises KeyError."""
        with self._lock:
            record = self._of(tenant)[id]
            if record.open:
                self._end(record, "cancelled", record.job.message)
            return record.job

    def resume(self, tenant: str, id: str) -> Job:
        """Continue a job that was cancelled, has failed or was parked; any other is left as it is.
        Raises KeyError."""
        with self._lock:
            record = self._of(tenant)[id]
            if record.job.state in ("cancelled", "failed", "parked"):
                record.attempts = 0
                record.job = replace(record.job, state="queued", message="", finished=None)
                self._service.default_cache.catalog.put_setting(_UNFINISHED + tenant, "")
                self._save(record)
                self._schedule()
            return record.job

    def _of(self, tenant: str) -> dict[str, _JobRecord]:
        """A tenant's jobs by id, the oldest first; read from its store on first use."""
        if tenant not in self._tenants:
            catalog = self._service.cache(tenant).catalog
            records = [_from_json(text) for text in catalog.settings(_RECORD).values()]
            records.sort(key=lambda record: record.job.created)
            catalog.withdraw_others(
                {record.promise for record in records if record.promise is not None}
            )
            for record in records:  # written by an earlier release
                if record.index and record.promise is None and record.job.state != "done":
                    record.promise = catalog.promise(record.documents)
                    self._save(record)
            self._tenants[tenant] = {record.job.id: record for record in records}
            for record in records:
                if record.open and record.attempts >= ATTEMPTS:
                    self._end(
                        record,
                        "parked",
                        f"the process ended {record.attempts} times while this job was running: "
                        "see its log, and resume the job to try again",
                    )
        return self._tenants[tenant]

    def _schedule(self) -> None:
        if not self._scheduled and self._next() is not None:
            self._scheduled = True
            self._service.scheduler.submit_recurring(self._step)

    def _next(self) -> _JobRecord | None:
        """The oldest job of the next tenant whose oldest job is ready for a step."""
        for one in self._tenants.values():
            record = next((record for record in one.values() if record.open), None)
            if record is not None and (record.preparation is None or record.preparation.done()):
                return record
        return None

    def _step(self) -> bool:
        """Run one batch; returns whether there is more to do."""
        with self._lock:
            record = self._next()
            self._scheduled = record is not None
            if record is None:
                return False
            tenant = record.job.tenant
            self._tenants[tenant] = self._tenants.pop(
                tenant
            )  # its next turn comes after all others'
            record.job = replace(record.job, state="running")
            self._running = record
        try:
            if record.preparation is None:
                self._begin(record)
                return True
            if record.steps is None:
                record.steps = self._steps(record, record.preparation.result())
            what, done, total = next(record.steps)
        except StopIteration as end:
            self._ended(record, "done", _summary(end.value))
        except (ShuttingDown, RequestCancelled, CancelledError) as error:  # or the job was
            with self._lock:
                self._running = record.preparation = None
                self._scheduled = isinstance(error, CancelledError)
            return self._scheduled
        except RagCacheError as error:
            self._ended(record, "failed", str(error))
        except Exception:
            logger.exception("job %s failed", record.job.id)
            self._ended(record, "failed", "an internal error: see the service's log")
        else:
            with self._lock:
                self._running = None
                if record.open:
                    record.job = replace(record.job, done=done, total=total, message=what)
                    if done and record.attempts and what in ("index", "precompute"):
                        record.attempts = 0  # it made progress
                        self._save(record)
                else:  # cancelled meanwhile
                    record.steps = record.preparation = None
        return True

    def _begin(self, record: _JobRecord) -> None:
        """Start the preparation: splitting the documents, or planning the computation."""
        with self._lock:
            self._running = None
            if not record.open:  # cancelled meanwhile
                return
            record.preparation = preparation = self._service.split_scheduler.submit_background(
                self._prepare(record), tenant=record.job.tenant, limit=sys.maxsize
            )
        preparation.add_done_callback(self._on_prepared)

    def _on_prepared(self, _: object) -> None:
        with self._lock:
            self._schedule()

    def _prepare(self, record: _JobRecord) -> Generator[Step, None, Split | BatchPlan | None]:
        """Runs on the splitter's thread: see :meth:`_begin`. Returns None if the texts are no
        longer needed.

        Attempts are counted here, so that a job does not count one while it only waits.
        """
        with self._lock:
            record.attempts += 1
            self._save(record)
        cache = self._service.cache(record.job.tenant)
        texts = cache.catalog.get_text(_TEXTS + record.job.id)
        if texts is None and record.index:
            return None
        documents = [Document(*fields) for fields in json.loads(texts or "[]")]
        if record.promise is None:
            return (yield from iter_plan(cache, documents, batch_tokens=BATCH_TOKENS))
        current = set(cache.catalog.promised(record.promise, record.documents))
        return (yield from cache.indexing.iter_split(d for d in documents if d.id in current))

    def _reset_attempts(self) -> None:
        """The process ends in order, so no job is to blame for it."""
        with self._lock:
            for one in self._tenants.values():
                for record in one.values():
                    if record.open and record.attempts:
                        record.attempts = 0
                        self._save(record)

    def _steps(
        self, record: _JobRecord, prepared: Split | BatchPlan | None
    ) -> Generator[Step, None, Added | Precomputed | PrecomputeResult]:
        """Index the documents, unless that is done or not wanted; then compute their KV."""
        cache, name = self._service.cache(record.job.tenant), _TEXTS + record.job.id
        if isinstance(prepared, BatchPlan):
            finished = yield from iter_run_locally(cache, prepared)
            cache.catalog.drop_text(name)
            return finished
        texts = cache.catalog.get_text(name)
        if texts is None:
            return (
                yield from cache.indexing.iter_compute(record.documents, batch_tokens=BATCH_TOKENS)
            )
        steps = cache.indexing.iter_add(
            [Document(*fields) for fields in json.loads(texts)],
            ttl_s=None if record.expires is None else max(1e-3, record.expires - time.time()),
            pinned=record.pinned,
            promise=record.promise,
            split=prepared,
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

    def _ended(self, record: _JobRecord, state: State, message: str) -> None:
        with self._lock:
            self._running = record.steps = record.preparation = None
            if record.open or state == "done":
                try:
                    self._end(record, state, message)
                except RagCacheError:
                    logger.exception("the end of job %s could not be recorded", record.job.id)

    def _end(self, record: _JobRecord, state: State, message: str) -> None:
        tenant, catalog = record.job.tenant, self._service.default_cache.catalog
        record.job = replace(record.job, state=state, message=message, finished=time.time())
        if record.preparation is not None:
            record.preparation.cancel()
        if record is not self._running:
            record.steps = record.preparation = None
        self._save(record)
        if not any(other.open for other in self._of(tenant).values()):
            catalog.drop_setting(_UNFINISHED + tenant)

    def _save(self, record: _JobRecord) -> None:
        known = {
            "job": asdict(record.job),
            "documents": record.documents,
            "expires": record.expires,
            "pinned": record.pinned,
            "index": record.index,
            "promise": record.promise,
            "attempts": record.attempts,
        }
        catalog = self._service.cache(record.job.tenant).catalog
        catalog.put_setting(_RECORD + record.job.id, json.dumps(known))

    def _delete_old(self, tenant: str) -> None:
        ended = [id for id, record in self._of(tenant).items() if not record.open]
        for id in ended[: max(0, len(ended) - MAX_ENDED)]:
            record = self._of(tenant)[id]
            catalog = self._service.cache(tenant).catalog
            if record.promise is not None:
                catalog.withdraw(record.promise, record.documents)
            catalog.drop_text(_TEXTS + id)
            catalog.drop_setting(_RECORD + id)
            del self._of(tenant)[id]


def _from_json(text: str) -> _JobRecord:
    known: dict[str, Any] = json.loads(text)
    return _JobRecord(
        Job(**known["job"]),
        known["documents"],
        known["expires"],
        known["pinned"],
        known.get("index", True),  # absent in records of earlier releases, as the next two
        known.get("promise"),
        known.get("attempts", 0),
    )


def _summary(done: Added | Precomputed | PrecomputeResult) -> str:
    if isinstance(done, PrecomputeResult):
        return done.summary()
    computed = done.precomputed if isinstance(done, Added) else done
    kv = f"KV of {computed.encoded} chunks computed, {computed.stored} were stored already"
    if isinstance(done, Precomputed):
        return kv
    overtaken = f", {done.overtaken} skipped: written or deleted since" if done.overtaken else ""
    return f"{done.documents} documents indexed, {done.unchanged} unchanged{overtaken}; {kv}"
