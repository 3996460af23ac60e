"""Documents in the background: progress, cancelling, resuming, and no delay for questions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ragcache.api import jobs as module
from ragcache.api.jobs import Job, Jobs
from ragcache.api.service import Service
from ragcache.api.ticket_queue import QueueFull, ShuttingDown
from ragcache.core.precompute import Precomputed
from ragcache.core.request import Request
from ragcache.errors import ConfigError, SourceError, StoreError
from ragcache.retriever.split import WHOLE
from ragcache.types import Document
from tests import scene
from tests.api.scene import SOON, Heard, Held, NewThreads, asked, at_once, small

QUESTION = "Where does Mira Holt live?"


@pytest.fixture(autouse=True)
def one_chunk_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with small(tmp_path) as made:
        yield made


def until(jobs: Jobs, job: Job, *states: str) -> Job:
    """The job, once it is in one of these states."""
    waited = threading.Event()
    for _ in range(int(SOON / 0.002)):
        if (now := jobs.get(job.tenant, job.id)).state in states:
            return now
        waited.wait(0.002)
    raise AssertionError(now)


class Slow:
    """An engine whose batches are counted, each of which waits for :meth:`go`."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
        engine = service.default_cache.engine
        self._encode = engine.encode
        self._context = service.default_cache.indexing.encoding.context
        self.at, self._go, self.log = threading.Semaphore(0), threading.Semaphore(0), log
        monkeypatch.setattr(engine, "encode", self)

    def __call__(self, chunks: Sequence[tuple[int, ...]], **options: Any) -> Any:
        if options.get("context", ()) in (self._context, ()):  # else the same, for sensitivity
            self.log.append("batch")
            self.at.release()
            assert self._go.acquire(timeout=SOON)
        return self._encode(chunks, **options)

    def begun(self) -> None:
        """Wait until the next batch has begun."""
        assert self.at.acquire(timeout=SOON)

    def go(self, batches: int = 1) -> None:
        self._go.release(batches)


def stored(service: Service, tenant: str = "") -> int:
    return service.cache(tenant).store.stats().chunks


def test_it_does_what_add_does(service: Service, tmp_path: Path) -> None:
    jobs = Jobs(service)
    job = jobs.add("a", scene.DOCUMENTS, ttl_s=3600, pinned=True)
    assert (job.state, job.done, job.total) == ("queued", 0, 3)
    job = until(jobs, job, "done")
    with scene.small(tmp_path / "other") as other:
        added = other.add(scene.DOCUMENTS)
        assert stored(service, "a") == other.store.stats().chunks
    assert job.done == job.total == added.precomputed.encoded
    assert job.finished is not None and job.finished >= job.created
    encoded = added.precomputed.encoded
    assert job.message == (
        f"3 documents indexed, 0 unchanged; KV of {encoded} chunks computed, 0 were stored already"
    )
    entries = service.cache("a").documents()
    assert all(entry.pinned and entry.expires is not None for entry in entries)
    assert {c.miss for c in asked(service, QUESTION, tenant="a").report.chunks} == {None}
    assert jobs.list("a") == [job] and jobs.list("b") == []
    assert jobs.cancel("a", job.id) == jobs.resume("a", job.id) == job
    with pytest.raises(KeyError):
        jobs.get("b", job.id)


def test_without_an_index_it_computes_and_keeps_no_documents(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Document("long", "A parrot. " * 400, WHOLE)
    log: list[str] = []
    jobs, slow = Jobs(service), Slow(service, monkeypatch, log)
    job = jobs.add("", [*scene.DOCUMENTS, long], index=False)
    slow.begun()
    slow.go()
    slow.begun()
    jobs.cancel("", job.id)
    slow.go()
    service.scheduler.call(lambda: None).result(SOON)
    assert len(log) == stored(service) == 2
    again = Jobs(service)  # as after a restart: the texts were kept
    again.resume("", job.id)
    slow.go(100)
    job = until(again, job, "done")
    assert job.done == job.total == len(log) - 2 and stored(service) == len(log)
    assert "2 were there; 1 documents skipped, the first is long: chunk long#0" in job.message
    assert service.default_cache.documents() == [] and not service.default_cache.catalog.settings(
        "job-texts:"
    )
    chunks = [
        c
        for document in scene.DOCUMENTS
        for c in service.default_cache.indexing.splitter.split(document)
    ]
    assert {c.miss for c in asked(service, QUESTION, chunks=chunks).report.chunks} == {None}
    with pytest.raises(ConfigError, match="without index no documents are kept"):
        jobs.add("", scene.DOCUMENTS, pinned=True, index=False)


def test_what_cannot_be_is_refused_at_once(service: Service) -> None:
    jobs = Jobs(service)
    with pytest.raises(SourceError, match="ids are given to several documents"):
        jobs.add("", [scene.DOCUMENTS[0]] * 2)
    with pytest.raises(ConfigError, match="ttl_s is 0"):
        jobs.add("", scene.DOCUMENTS, ttl_s=0)
    with pytest.raises(ConfigError, match="cannot be a tenant"):
        jobs.add("..", scene.DOCUMENTS)
    assert jobs.list("") == []


def test_as_many_as_may_be_open_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 1)
    jobs, slow = Jobs(service), Slow(service, monkeypatch, [])
    first = jobs.add("", scene.DOCUMENTS)
    slow.begun()
    with pytest.raises(QueueFull, match="1 jobs are waiting already"):
        jobs.add("", scene.DOCUMENTS)
    other = jobs.add("a", scene.DOCUMENTS)
    jobs.cancel("", first.id)
    second = jobs.add("", scene.DOCUMENTS)
    slow.go(100)
    assert until(jobs, second, "done") and until(jobs, other, "done")
    assert [job.id for job in jobs.list("")] == [first.id, second.id]


def test_cancelled_it_ends_at_the_next_batch_and_keeps_what_is_done(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    jobs, slow = Jobs(service), Slow(service, monkeypatch, log)
    job = jobs.add("", scene.DOCUMENTS)
    slow.begun()
    slow.go()
    slow.begun()
    assert jobs.get("", job.id).state == "running"
    assert (jobs.get("", job.id).done, jobs.get("", job.id).message) == (1, "precompute")
    assert jobs.cancel("", job.id).state == "cancelled"
    slow.go()
    service.scheduler.call(lambda: None).result(SOON)
    assert len(log) == stored(service) == 2
    assert (
        len(service.default_cache.documents()) == 3
    )  # which are found, and computed when they are used
    resumed = jobs.resume("", job.id)
    assert resumed.state == "queued" and resumed.finished is None
    slow.go(100)
    done = until(jobs, job, "done")
    assert "2 were stored already" in done.message
    assert stored(service) == len(log)  # each was computed once


def test_a_question_waits_for_one_batch_at_most(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.default_cache.add(scene.DOCUMENTS[:1])
    log: list[str] = []
    jobs, slow, heard = Jobs(service), Slow(service, monkeypatch, log), Heard("q", log)
    job = jobs.add("", scene.DOCUMENTS)
    slow.begun()
    service.submit("", Request(QUESTION, top_k=1, neighbours=0), heard)
    slow.go(100)
    until(jobs, job, "done")
    assert heard.end() == "done" and log[:2] == ["batch", "q1"]


def test_tenants_take_turns(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(service)
    order: list[str] = []
    step = jobs._steps

    def noted(work: module._JobRecord, before: Any) -> Any:
        for one in (steps := step(work, before)):
            order.append(work.job.tenant)
            yield one
        del steps
        return Precomputed(0, 0, 0, 0, 0.0)

    monkeypatch.setattr(jobs, "_steps", noted)
    monkeypatch.setattr(service.split_scheduler, "submit_background", at_once)
    with Held(service.scheduler):
        first = [jobs.add("a", [document]) for document in scene.DOCUMENTS]
        last = jobs.add("b", scene.DOCUMENTS[:1])
    for job in (*first, last):
        until(jobs, job, "done")
    assert order[:6] == ["a", "b"] * 3


@pytest.mark.parametrize("batches", [0, 2])
def test_it_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, new_threads: NewThreads
) -> None:
    """It goes on by itself, from its documents' texts or from what is indexed."""
    log: list[str] = []
    with small(tmp_path) as service:
        jobs, slow = Jobs(service), Slow(service, monkeypatch, log)
        if batches:
            job = jobs.add("a", scene.DOCUMENTS)
            for _ in range(batches):
                slow.begun()
                slow.go()
        else:
            with Held(service.scheduler):
                job = jobs.add("a", scene.DOCUMENTS)
                closing = threading.Thread(target=service.close)
                closing.start()
                while not service.scheduler._draining:
                    pass
            closing.join()
        cancelled = jobs.add("b", scene.DOCUMENTS) if batches else None
        if cancelled is not None:
            jobs.cancel("b", cancelled.id)
            slow.go(1)
    assert not new_threads()
    with small(tmp_path) as service:
        jobs = Jobs(service)
        done = until(jobs, job, "done")
        assert (done.id, done.created) == (job.id, job.created)
        assert {entry.id for entry in service.cache("a").documents()} == {"holt", "mill", "boats"}
        keys = [k for d in scene.DOCUMENTS for k in service.cache("a").indexing.keys(d.id)]
        assert all(map(service.cache("a").store.has, keys))
        if cancelled is not None:
            assert jobs.get("b", cancelled.id).state == "cancelled"
            jobs.resume("b", cancelled.id)
            until(jobs, cancelled, "done")
            assert len(service.cache("b").documents()) == 3
        assert not service.default_cache.catalog.settings("jobs-of:")
        assert not service.cache("a").catalog.settings("job-texts:")


def test_a_failed_one_says_why_and_can_be_taken_up(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = Jobs(service)

    def fail(error: Exception) -> Callable[..., None]:
        def put(*_: object, **__: object) -> None:
            raise error

        return put

    with monkeypatch.context() as patch:
        patch.setattr(
            service.default_cache.catalog, "put_documents", fail(StoreError("the disk is full"))
        )
        job = jobs.add("", scene.DOCUMENTS)
        assert until(jobs, job, "failed").message == "the disk is full"
        patch.setattr(service.default_cache.catalog, "put_documents", fail(RuntimeError("secret")))
        other = jobs.add("", [Document("x", "Another text.")])
        assert until(jobs, other, "failed").message == "an internal error: see the service's log"
        assert "failed" in caplog.text
    jobs.resume("", job.id)
    until(jobs, job, "done")
    assert len(service.default_cache.documents()) == 3


def test_documents_deleted_meanwhile_leave_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, slow = Jobs(service), Slow(service, monkeypatch, [])
    job = jobs.add("", scene.DOCUMENTS[:1])
    slow.begun()
    service.default_cache.delete(["holt"])
    slow.go(100)
    until(jobs, job, "done")
    assert stored(service) == 1  # the prefix


def test_only_the_last_that_have_ended_are_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 2)
    jobs = Jobs(service)
    made = []
    for number in range(4):
        made.append(jobs.add("", [Document(f"d{number}", "A text.")]))
        until(jobs, made[-1], "done")
    assert [job.id for job in jobs.list("")] == [job.id for job in made[1:]]
    assert len(service.default_cache.catalog.settings("job:")) == 3


def test_none_is_taken_up_once_all_ends(service: Service) -> None:
    jobs = Jobs(service)
    service.scheduler.close()
    job = jobs.add("", scene.DOCUMENTS)  # is durable: the next process does it
    assert jobs.get("", job.id).state == "queued"
    with pytest.raises(ShuttingDown):
        service.add("", scene.DOCUMENTS)


def test_one_that_ends_the_process_is_parked(tmp_path: Path) -> None:
    """Nothing of it was done when the process was gone, as many times as are tried."""
    with small(tmp_path) as service, Held(service.scheduler):
        job = Jobs(service).add("", scene.DOCUMENTS)
        other = Jobs(service).add("", [Document("x", "Another text.")])
        known = service.default_cache.catalog.settings("job:")
        service.on_drained.clear()
    for attempts, state in ((module.ATTEMPTS - 1, "done"), (module.ATTEMPTS, "parked")):
        record = json.loads(known["job:" + job.id]) | {"attempts": attempts}
        with scene.small(tmp_path) as cache:
            cache.catalog.put_setting("job:" + job.id, json.dumps(record))
            cache.catalog.put_setting("jobs-of:", "")
        with small(tmp_path) as service:
            jobs = Jobs(service)
            found = until(jobs, job, "done", "parked")
            assert found.state == state, found
            until(jobs, other, "done")
            if state == "parked":
                assert "ended 3 times while this job was running" in found.message
                jobs.resume("", job.id)
                until(jobs, job, "done")


def test_an_attempt_is_counted_before_it_and_forgotten_once_it_got_somewhere(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    splitting = service.default_cache.indexing.splitter.chunks

    def attempts() -> int:
        [record] = service.default_cache.catalog.settings("job:").values()
        return int(json.loads(record)["attempts"])

    def split(document: Document) -> Any:
        seen.append(attempts())
        return splitting(document)

    monkeypatch.setattr(
        type(service.default_cache.indexing.splitter), "chunks", lambda _, one: split(one)
    )
    jobs = Jobs(service)
    until(jobs, jobs.add("", scene.DOCUMENTS), "done")
    assert seen == [1, 1, 1] and attempts() == 0


def test_the_next_process_is_not_told_of_an_end_in_order(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        stands, go = threading.Event(), threading.Event()

        def stuck(document: Document) -> Any:
            stands.set()
            go.wait(SOON)
            return []

        object.__setattr__(service.default_cache.indexing.splitter, "chunks", stuck)
        jobs = Jobs(service)
        job = jobs.add("", scene.DOCUMENTS)
        assert stands.wait(SOON)
        answer = asked(service, QUESTION)  # the engine is free meanwhile
        assert answer.tokens
        jobs.cancel("", job.id)
        jobs.resume("", job.id)
        go.set()
        service.close()
    with scene.small(tmp_path) as cache:
        [record] = cache.catalog.settings("job:").values()
        assert json.loads(record)["attempts"] == 0
