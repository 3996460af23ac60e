"""An answer without chunks says so in its first event and its report, and can be refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ragcache.api import batch_file
from ragcache.core.precompute import drive
from ragcache.errors import NoChunksError
from ragcache.types import Document
from tests import scene
from tests.api.conftest import Served
from tests.api.routes.test_answers import QUESTION, chat, events

WHY = "the store of tenant bob holds no documents"


@pytest.fixture(params=["query", "chat"])
def ask(request: pytest.FixtureRequest, bob: httpx.Client) -> Iterator[Any]:
    def asked(stream: bool = False, **options: Any) -> httpx.Response:
        if request.param == "query":
            body = {"question": QUESTION, "stream": stream, **options}
            return bob.post("/v1/query", json=body)
        return chat(bob, stream=stream, ragcache=options)

    yield asked


def test_the_report_and_the_usage_say_it(ask: Any, ann: httpx.Client) -> None:
    found = ask().json()
    assert found["ragcache"]["no_chunks"] == WHY and found["usage"]["chunks"] == 0
    other = ann.post("/v1/query", json={"question": QUESTION}).json()
    assert other["ragcache"]["no_chunks"] is None and other["usage"]["chunks"] > 0


def test_a_stream_says_it_first(ask: Any) -> None:
    first, *_, last, done = events(ask(stream=True))
    assert done == "[DONE]" and last["ragcache"]["no_chunks"] == WHY
    assert first.get("no_chunks") == WHY or first["ragcache"] == {"no_chunks": WHY}


@pytest.mark.parametrize("stream", [False, True])
def test_it_can_be_refused(ask: Any, stream: bool) -> None:
    refused = ask(stream=stream, require_chunks=True)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "no_chunks") and WHY in error["message"]


def test_given_none_and_looked_for_none(ann: httpx.Client, bob: httpx.Client) -> None:
    given = chat(ann, documents=[]).json()
    assert given["ragcache"]["no_chunks"] == "none were given"
    refused = chat(ann, documents=[], ragcache={"require_chunks": True})
    assert refused.status_code == 422
    assert bob.post("/v1/search", json={"question": QUESTION}).json()["no_chunks"] == WHY
    assert ann.post("/v1/search", json={"question": QUESTION}).json()["no_chunks"] is None


def test_it_is_counted(running: Served, bob: httpx.Client) -> None:
    bob.post("/v1/query", json={"question": QUESTION})
    text = bob.get("/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("ragcache_no_chunks_total")]
    assert float(line.split()[1]) > 0


def test_in_python(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        assert cache.ask(QUESTION).report.no_chunks == "the store holds no documents"
        with pytest.raises(NoChunksError, match="the store holds no documents"):
            cache.ask(QUESTION, require_chunks=True)
        cache.add([Document("blank", " ")])
        assert cache.ask(QUESTION).report.no_chunks == "the 1 documents of the store have no text"
        cache.add(scene.DOCUMENTS)
        assert cache.ask(QUESTION, require_chunks=True).report.no_chunks is None
    with scene.small(tmp_path / "strict", require_chunks=True) as cache:
        with pytest.raises(NoChunksError):
            cache.ask(QUESTION)
        assert cache.ask(QUESTION, require_chunks=False).report.no_chunks


def test_in_a_batch(tmp_path: Path) -> None:
    lines = [{"question": QUESTION}, {"question": QUESTION, "require_chunks": True}]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with scene.small(tmp_path / "store") as cache:
        done = drive(batch_file.iter_answer_batch(cache, batch_file.read_batch(file), out), None)
    answered, refused = map(json.loads, out.read_text().splitlines())
    assert (done.without, done.failed) == (1, 1)
    assert "holds no documents" in answered["response"]["body"]["ragcache"]["no_chunks"]
    assert refused["response"]["status_code"] == 422 and refused["error"]["code"] == "no_chunks"
