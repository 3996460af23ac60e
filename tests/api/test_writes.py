"""Of two acknowledged writes the later one wins, with jobs and at any end of the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from ragcache.api.jobs import Jobs
from ragcache.api.service import Service
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.disk.store import DiskStore
from ragcache.types import Document
from tests import models, scene
from tests.api.scene import SOON, Held, at_once, small

NAMES = "abcd"
ENGINE = models.engine("llama")


class Stepped:
    """A scheduler that does background work when the test says so."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], bool]] = []

    def submit_recurring(self, step: Callable[[], bool]) -> None:
        self.steps.append(step)

    def step(self) -> bool:
        """One step; whether there was any."""
        if self.steps and not self.steps[0]():
            self.steps.pop(0)
        return bool(self.steps)

    submit_background = staticmethod(at_once)

    def close(self, seconds: float = 0.0) -> None:
        self.steps.clear()


class Writes(RuleBasedStateMachine):
    """What is stored at the end is what the last of all acknowledged writes says; of a job that
    was cancelled, it may be what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.written: dict[str, list[tuple[str, str | None]]] = {name: [] for name in NAMES}
        self.number = 0
        self.open()

    def open(self) -> None:
        self.scheduler = Stepped()
        store, embedder = DiskStore(self.path), HashEmbedder()
        own = RagCache(ENGINE, store, embedder, self.path, Settings.load(ratio=0.15))
        self.service = Service(own, self.scheduler)  # type: ignore[arg-type]
        self.service.split_scheduler.close()
        self.service.split_scheduler = self.scheduler  # type: ignore[assignment]
        self.jobs = Jobs(self.service)

    def text(self, name: str) -> str:
        self.number += 1
        return f"Text {self.number} of {name}."

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def add_job(self, names: set[str]) -> None:
        texts = {name: self.text(name) for name in sorted(names)}
        job = self.jobs.add("", [Document(*one) for one in texts.items()])
        for name, text in texts.items():
            self.written[name].append((job.id, text))

    @rule(name=st.sampled_from(NAMES))
    def put(self, name: str) -> None:
        text = self.text(name)
        self.service.default_cache.add([Document(name, text)])
        self.written[name].append(("", text))

    @rule(name=st.sampled_from(NAMES))
    def put_what_is_there(self, name: str) -> None:
        if (text := self.stored().get(name)) is not None:
            self.service.default_cache.add([Document(name, text)])
            self.written[name].append(("", text))

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        self.service.default_cache.delete([name])
        self.written[name].append(("", None))

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    @precondition(lambda self: self.jobs.list(""))
    @rule(data=st.data())
    def cancel_or_resume(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs.list("")))
        (self.jobs.resume if job.state == "cancelled" else self.jobs.cancel)("", job.id)

    @rule()
    def kill(self) -> None:
        """All that is in memory is lost."""
        self.service.default_cache.close()
        self.open()

    def stored(self) -> dict[str, str]:
        catalog = self.service.default_cache.catalog
        rows = {name: catalog.rows_of(name) for name in NAMES}
        return {n: "".join(c.text for c in catalog.chunks(r)) for n, r in rows.items() if r}

    def teardown(self) -> None:
        try:
            while self.scheduler.step():
                pass
            states = {job.id: job.state for job in self.jobs.list("")}
            assert set(states.values()) <= {"done", "cancelled"}
            found = self.stored()
            for name, writes in self.written.items():
                may: set[str | None] = set()
                for job, text in reversed(writes):
                    may.add(text)
                    if states.get(job) != "cancelled":
                        break
                else:
                    may.add(None)
                assert found.get(name) in may, (name, writes, states)
        finally:
            self.service.default_cache.close()
            self.folder.cleanup()


def test_the_later_write_wins() -> None:
    quick = settings(
        max_examples=8,
        stateful_step_count=14,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Writes, settings=quick)


OLD = [Document(f"d{n:03}", f"The old text of number {n}.") for n in range(12)]


def later_writes(service: Service, took: Callable[[], None] = lambda: None) -> None:
    """A job is taken, and before it comes to them three of its documents are written."""
    service.default_cache.add([OLD[8]])
    with Held(service.scheduler):
        Jobs(service).add("", OLD)
        assert service.default_cache.delete(["d005"]) == ["d005"]  # which was on its way
        service.default_cache.add([Document("d006", "Newer.")])
        service.default_cache.add([OLD[8]], pinned=True)  # unchanged, and a write all the same
        took()


def check_later_writes(service: Service) -> None:
    until, [job] = time.monotonic() + SOON, service.default_cache.catalog.settings("job:").values()
    while json.loads(job)["job"]["state"] != "done":
        assert time.monotonic() < until, job
        time.sleep(0.005)
        [job] = service.default_cache.catalog.settings("job:").values()
    assert {entry.id for entry in service.default_cache.documents()} == {d.id for d in OLD} - {
        "d005"
    }
    [row] = service.default_cache.catalog.rows_of("d006")
    assert service.default_cache.catalog.chunk(row).text == "Newer."
    assert (pinned := service.default_cache.catalog.entry("d008")) is not None and pinned.pinned
    assert "3 skipped: written or deleted since" in json.loads(job)["job"]["message"]


def test_what_is_written_after_a_job_was_taken_stands(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        later_writes(service)
        check_later_writes(service)


CHILD = """
import sys, time
from pathlib import Path
from tests.api import scene, test_writes

def told():
    print("taken", flush=True)
    time.sleep(60)

test_writes.later_writes(scene.small(Path(sys.argv[1])), told)
"""


@pytest.mark.slow  # starts a process
def test_so_it_is_after_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"taken\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with small(tmp_path) as service:
        Jobs(service)
        check_later_writes(service)


def test_a_job_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    """Its record has no promise."""
    with small(tmp_path) as service:
        catalog = service.default_cache.catalog
        with Held(service.scheduler):
            job = Jobs(service).add("", OLD[:2])
            known = json.loads(catalog.settings("job:")["job:" + job.id])
            del known["promise"]
            service.default_cache.close()
    with scene.small(tmp_path) as cache:
        cache.catalog.put_setting("job:" + job.id, json.dumps(known))
    with small(tmp_path) as service:
        jobs, until = Jobs(service), time.monotonic() + SOON
        while jobs.get("", job.id).state != "done":
            assert time.monotonic() < until
            time.sleep(0.005)
        assert len(service.default_cache.documents()) == 2
