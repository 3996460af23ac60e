"""An id means exactly the document that it names, in every route and command."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from ragcache.batch.plan import make_plan
from ragcache.errors import SourceError
from ragcache.retriever.source import read
from ragcache.types import Document
from tests import scene
from tests.api.conftest import Served, served

WRONG = ["", "a\n", "a\nb", "\x1b[31m", "a\x00", "a\x85", "a\u2028b", "a" * 1001]
ODD = ["a/b", "a%2Fb", "..", "../a", "a//b", "/a", "é", "日本", "a b", "a?b#c", "a\\b", "%", "."]


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("open"), keys=()) as one:
        yield one


def status(one: Served, method: str, path: str) -> int:
    """Of a request whose path is sent as it is; clients take ``..`` for a folder."""
    host, port = one.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sent:
        sent.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        return int(sent.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_an_id_is_refused_at_every_door(
    open_: Served, name: str, tmp_path: Path
) -> None:
    with open_.client(None) as client:
        body = {"documents": [{"id": name, "text": "A text."}]}
        for route in ("/v1/documents", "/v1/jobs"):
            refused = client.post(route, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (
                400,
                "documents.0.id",
            )
    cache = open_.service.default_cache
    with pytest.raises(SourceError, match="cannot be a document's id"):
        cache.add([Document(name, "A text.")])
    [skipped] = make_plan(cache, [Document(name, "A text.")]).skipped
    assert "cannot be a document's id" in skipped.why
    if name and "\0" not in name:  # a record without an id is called by its line, NULs are dropped
        (file := tmp_path / "x.jsonl").write_text(json.dumps({"id": name, "text": "A text."}))
        errors: list[SourceError] = []
        assert not list(read([file], on_error=errors.append)) and len(errors) == 1


def test_odd_ids_are_found_and_deleted(open_: Served) -> None:
    with open_.client(None) as client:
        body = {"documents": [{"id": name, "text": f"{name} it is."} for name in ODD]}
        client.post("/v1/documents", json=body).raise_for_status()
    for name in ODD:
        path = "/v1/documents/" + quote(name, safe="")
        assert status(open_, "GET", path) == 200, name
        assert status(open_, "DELETE", path) == 200, name
        assert open_.service.default_cache.catalog.entry(name) is None
        assert status(open_, "DELETE", path) == 404, name


@pytest.mark.parametrize("end", ["%0A", "%0D%0A", "%00", "%FF", "%0Ab"])
def test_what_is_behind_an_id_is_not_passed_over(open_: Served, end: str) -> None:
    with open_.client(None) as client:
        body = {"documents": [{"id": one, "text": "A text."} for one in ("a", "a\ufffd")]}
        client.post("/v1/documents", json=body).raise_for_status()
    for method in ("GET", "DELETE"):
        assert status(open_, method, f"/v1/documents/a{end}") == 400
    assert open_.service.default_cache.catalog.entry(
        "a"
    ) and open_.service.default_cache.catalog.entry("a\ufffd")


def test_an_earlier_releases_document_is_deleted_by_its_own_id(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        cache.add([Document("a", "One.")])
        for one in cache.indexing.splitter.split(Document("a\n", "Two.")):
            vectors = cache.retriever.embedder.embed([one.text])
            cache.catalog.put_document(Document("a\n", "Two."), [one], vectors, b"")
        assert cache.delete(["a\n"]) == ["a\n"]
        assert [entry.id for entry in cache.documents()] == ["a"]
