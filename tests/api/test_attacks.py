"""Requests that try to deny service to others, against a service in a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bench.reliability import hostile_remote
from ragcache.api.jobs import ATTEMPTS, Jobs
from ragcache.api.requests import Chat, NewDocuments, StrictModel, Tokenize
from ragcache.batch.plan import iter_plan
from ragcache.core.request import Request
from ragcache.errors import ContextError
from ragcache.retriever.split import WHOLE
from ragcache.types import Document
from tests.api.scene import SOON, Heard, small
from tests.conftest import ROOT
from tests.store.disk.test_kills import reliability

MANY = 20_000
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Who?"}]}


def new(**fields: Any) -> dict[str, Any]:
    return {"documents": [{"id": "a", "text": "A text."} | fields]}


@pytest.mark.parametrize(
    ("schema", "given", "said"),
    [
        (Chat, CHAT | {f"f{n}": n for n in range(MANY)}, "this field is unknown"),
        (Chat, CHAT | {"messages": [{}] * MANY}, "Field required"),
        (Chat, CHAT | {"messages": [{"role": "user", "content": [{}] * MANY}]}, "Field required"),
        (Chat, CHAT | {"documents": [1] * MANY}, "should be"),
        (Chat, CHAT | {"documents": ["a"] * MANY}, "at most 10000 items"),
        (Tokenize, {"question": "Who?", "documents": [1] * MANY}, "should be"),
        (NewDocuments, {"documents": [{}] * MANY}, "Field required"),
        (NewDocuments, new(metadata=dict.fromkeys(map(str, range(MANY)), 1)), "limit of 100"),
        (NewDocuments, new(metadata={"a": "b" * MANY}), "limit of 16384, as every chunk"),
    ],
)
def test_of_many_mistakes_the_first_is_told(
    schema: type[StrictModel], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        schema.model_validate(given)
    assert caught.value.error_count() < 5


def test_a_document_that_is_one_chunk_is_bounded_before_it_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path) as service:
        engine = service.default_cache.engine
        long = Document("long", "a" * (engine.context_tokens * engine.token_bytes + 1), WHOLE)
        monkeypatch.setattr(engine, "tokenize", lambda *_, **__: 1 // 0)
        with pytest.raises(ContextError, match="cannot fit"):
            service.add("", [long]).result(SOON)
        with pytest.raises(ContextError, match="cannot fit"):
            service.default_cache.add([long])
        steps = iter_plan(service.default_cache, [long])
        with pytest.raises(StopIteration) as end:
            while True:
                next(steps)
        [skipped] = end.value.value.skipped
        assert "cannot fit" in skipped.why and service.default_cache.documents() == []


@pytest.mark.parametrize("what", ["index", "plan"])
def test_a_long_document_takes_short_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between two steps only so much is tokenised."""
    with small(tmp_path) as service:
        indexing, engine = service.default_cache.indexing, service.default_cache.engine
        text = "\n\n".join(f"Sentence {n} is about nothing at all." for n in range(3000))
        document = Document("long", text)
        if what == "index":
            for _ in service.default_cache.indexing.iter_add([document]):
                if service.default_cache.catalog.rows_of(
                    "long"
                ):  # committed, and nothing is computed yet
                    break
            steps: Any = indexing.iter_compute(["long"])
        else:
            steps = iter_plan(service.default_cache, [document])
        calls, tokenize = [0], engine.tokenize

        def counted(text: str, **options: Any) -> Any:
            calls[0] += 1
            return tokenize(text, **options)

        object.__setattr__(service.default_cache.template, "tokenize", counted)
        most = total = 0
        for name, *_ in steps:
            most, total, calls[0] = max(most, calls[0]), total + calls[0], 0
            if name == "precompute":
                break
        assert total >= 100 and most <= 66, (total, most)


def test_no_remote_is_believed() -> None:
    outcome = hostile_remote.run(hostile_remote.SHORT, 1)
    assert not outcome.violations, outcome.grouped_violations()


CHILD = """
import os, signal, sys, time
from pathlib import Path
from ragcache.api.jobs import Jobs
from ragcache.api.serve import Server
from ragcache.api.middleware.auth import ApiKeys
from ragcache.retriever.split import Splitter
from ragcache.types import Chunk, Document
from tests.api.scene import small

chunks = Splitter.chunks

def hostile(self, document):
    if document.id == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    while document.id == "endless":
        time.sleep(0.001)
        yield Chunk("endless", 0, "A text.")
    yield from chunks(self, document)

Splitter.chunks = hostile
with small(Path(sys.argv[1]), host="127.0.0.1", port=0, grace_s=1.0) as service:
    if sys.argv[2]:
        Jobs(service).add("hostile", [Document(sys.argv[2], "Its text.")])
    Server(service, ApiKeys(), lambda url: print(url, flush=True)).run()
print("closed", flush=True)
"""


def child(path: Path, document: str = "") -> subprocess.Popen[bytes]:
    """A service to which a job with this document is given."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), document],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


@pytest.mark.slow  # starts processes
def test_a_job_that_ends_its_process_is_parked_and_the_others_are_served(tmp_path: Path) -> None:
    for attempt in range(ATTEMPTS):
        with child(tmp_path, "" if attempt else "kills") as one:
            assert one.wait(60) == -signal.SIGKILL, attempt
    with child(tmp_path) as one:  # it still would: what ends the process is not tried again
        assert one.stdout is not None and one.stdout.readline().startswith(b"http://")
        one.send_signal(signal.SIGTERM)
        assert one.stdout.readline() == b"closed\n" and one.wait(20) == 0
    with small(tmp_path) as service:
        [job] = Jobs(service).list("hostile")
        assert job.state == "parked" and "the process ended 3 times" in job.message
        heard = Heard()
        service.submit("victim", Request("Who?"), heard)
        assert heard.end() == "done"


@pytest.mark.slow  # starts a process
def test_sigterm_ends_a_process_that_splits(tmp_path: Path) -> None:
    with child(tmp_path, "endless") as one:
        assert one.stdout is not None and one.stdout.readline().startswith(b"http://")
        time.sleep(0.5)
        began = time.monotonic()
        one.send_signal(signal.SIGTERM)
        assert one.stdout.readline() == b"closed\n" and one.wait(20) == 0
        assert time.monotonic() - began < 10
    with small(tmp_path) as service:
        [job] = Jobs(service).list("hostile")
        assert job.state in ("queued", "running", "done")


@pytest.mark.slow  # starts services
@pytest.mark.parametrize("scene", ["shut-out", "flood", "stale-write"])
def test_nobody_is_kept_out_and_nothing_undone(scene: str) -> None:
    reliability(scene)
