"""API keys, routes about stored documents and chunks, and routes about the service."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace

from ragcache.api import report_page
from ragcache.api.middleware.auth import ApiKeys, check_bind
from ragcache.api.serve import serve
from ragcache.errors import ConfigError
from ragcache.settings import ServiceSettings, Settings
from tests import scene
from tests.api.conftest import ANN, KEYS, Served, served

Clients = Callable[..., httpx.Client]


def routes(running: Served, client: httpx.Client) -> list[tuple[str, str]]:
    """Every method and path that the app has: those of the document, and the others."""
    found = client.get("/openapi.json").json()["paths"]
    listed = [(method.upper(), path) for path, methods in found.items() for method in methods]
    own = [("GET", "/docs"), ("GET", "/docs/oauth2-redirect"), ("GET", "/openapi.json")]
    return [*listed, *own]


def test_every_route_but_health_asks_for_a_key(
    running: Served, clients: Clients, ann: httpx.Client
) -> None:
    found, stranger = routes(running, ann), clients(None)
    assert len(found) > 20
    for method, path in found:
        where = re.sub(r"\{.*?\}", "x", path)
        response = stranger.request(method, where)
        assert response.status_code == (200 if path == "/health" else 401), (method, path)
        if path != "/health":
            assert response.json()["error"]["code"] == "invalid_api_key"
            wrong = {"Authorization": "Bearer wrong"}
            assert stranger.request(method, where, headers=wrong).status_code == 401
    assert stranger.get("/nowhere").status_code == 401
    assert stranger.get("/demo").status_code in (200, 404)


def test_a_browser_may_read_with_basic(clients: Clients) -> None:
    stranger = clients(None)
    opened = stranger.get("/docs", headers={"Sec-Fetch-Mode": "navigate"})
    assert "Basic" in opened.headers["WWW-Authenticate"]
    assert "Basic" not in stranger.get("/docs").headers["WWW-Authenticate"]
    assert stranger.get("/docs", auth=("", ANN)).status_code == 200
    assert stranger.get("/docs", auth=("", "wrong")).status_code == 401
    assert stranger.post("/v1/query", auth=("", ANN), json={"question": "Who?"}).status_code == 401


def test_documents_chunks_and_jobs(ann: httpx.Client) -> None:
    body = {"documents": [{"id": "a/b?", "text": "The Gull sails.", "metadata": {"by": "me"}}]}
    added = ann.post("/v1/documents", json=body | {"ttl_s": 60}).json()
    assert added["documents"] == 1 and added["precomputed"]["encoded"] >= 1
    one = ann.get("/v1/documents/a%2Fb%3F").json()
    assert one["metadata"] == {"by": "me"} and one["expires"] > time.time()
    listed = ann.get("/v1/documents", params={"limit": 1}).json()
    assert listed["data"] == [one] and listed["has_more"]
    assert ann.delete("/v1/documents/a%2Fb%3F").json()["deleted"]
    assert ann.delete("/v1/documents/a%2Fb%3F").status_code == 404

    made = ann.post("/v1/chunks", json={"chunks": ["A text of its own."]}).json()
    [chunk] = made["data"]
    assert made["encoded"] == 1
    before = ann.get("/v1/chunks", params={"limit": 1000}).json()["data"]
    assert chunk["id"] in [one["id"] for one in before]
    assert before[0]["encoding_context"] == before[0]["compiled"] == "prose"
    assert ann.get("/v1/chunks", params={"after": before[-2]["id"]}).json()["data"] == before[-1:]
    assert ann.delete(f"/v1/chunks/{chunk['id']}").json()["deleted"]
    assert ann.delete(f"/v1/chunks/{chunk['id']}").status_code == 404
    assert ann.delete("/v1/chunks/xyz").status_code == 400

    job = ann.post("/v1/jobs", json=body).json()
    until = time.monotonic() + 20
    while (now := ann.get(f"/v1/jobs/{job['id']}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert now["state"] == "done" and now["id"] in [
        one["id"] for one in ann.get("/v1/jobs").json()["data"]
    ]
    assert ann.post(f"/v1/jobs/{job['id']}/cancel").json() == now
    assert ann.post("/v1/jobs/none/resume").status_code == 404
    assert ann.delete("/v1/documents/a%2Fb%3F").json()["deleted"]


def test_tenants_do_not_see_each_other(ann: httpx.Client, bob: httpx.Client) -> None:
    assert bob.get("/v1/documents").json()["data"] == []
    assert bob.get("/v1/documents/holt").status_code == 404
    body = {"question": "Where does Mira live?", "mode": "reuse"}
    assert bob.post("/v1/query", json=body).json()["passages"] == []
    assert ann.post("/v1/query", json=body).json()["passages"]
    job = ann.post("/v1/jobs", json={"documents": [{"id": "j", "text": "Gone."}]}).json()
    assert bob.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_ready_version_and_metrics(ann: httpx.Client) -> None:
    ann.post("/v1/query", json={"question": "Where does Mira live?", "mode": "reuse"})
    ready = ann.get("/ready").json()
    assert ready["check"]["ok"] and ready["check"]["compared"] > 0
    assert ready["check"]["error"] < 1e-4
    assert ready["quality_monitor"] is ready["guard"] is None
    assert ann.get("/version").json()["context_tokens"] == 512
    text = ann.get("/metrics").text
    for name in (
        'ragcache_ttft_seconds_count{mode="reuse"}',
        'ragcache_tokens_total{kind="cached"}',
        "ragcache_queue_depth 0.0",
        "ragcache_store_bytes ",
        'ragcache_requests_total{route="/v1/query",status="200"}',
    ):
        assert name in text, name


def test_ids_and_one_line_a_request_without_text(
    ann: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ragcache.access"):
        mine = {"X-Request-Id": "my-id"}
        body = {"question": "Where does Mira live?"}
        assert ann.post("/v1/query", json=body, headers=mine).headers["X-Request-Id"] == "my-id"
        evil = ann.get("/version", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]
        until = time.monotonic() + 5  # an answer is there before its line
        while len(caplog.records) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert re.fullmatch(r"req-[0-9a-f]{24}", evil)
    lines = [json.loads(record.message) for record in caplog.records]
    assert [(line["route"], line["status"], line["tenant"]) for line in lines] == [
        ("/v1/query", 200, "ann"),
        ("/version", 200, "ann"),
    ]
    assert lines[0]["request"] == "my-id" and lines[0]["cached_tokens"] >= 0
    assert "Mira" not in caplog.text


def test_a_request_is_a_span(ann: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    class Span(trace.NonRecordingSpan):
        def update_name(self, name: str) -> None:
            found["name"] = name

        def set_attribute(self, key: str, value: Any) -> None:
            found[key] = value

    class Tracer:
        @contextmanager
        def start_as_current_span(self, *args: Any, **kwargs: Any) -> Iterator[trace.Span]:
            yield Span(trace.INVALID_SPAN_CONTEXT)

    monkeypatch.setattr(trace, "get_tracer", lambda name: Tracer())
    ann.get("/version")
    until = time.monotonic() + 5
    while "ragcache.status" not in found and time.monotonic() < until:
        time.sleep(0.01)
    assert found["name"] == "GET /version" and found["ragcache.status"] == 200


def test_bodies_have_a_limit(tmp_path: Path) -> None:
    with served(tmp_path, body_bytes=2000) as one, one.client() as client:
        long = json.dumps({"question": "a" * 3000}).encode()
        head = {"content-type": "application/json"}
        assert client.post("/v1/query", content=long, headers=head).status_code == 413
        parts = iter([long[:1500], long[1500:]])  # no length is announced
        response = client.post("/v1/query", content=parts, headers=head)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_page_of_another_name_is_refused_where_there_are_no_keys(tmp_path: Path) -> None:
    with served(tmp_path, keys=()) as one, one.client(None) as client:
        assert client.get("/v1/documents").json()["data"] == []
        evil = client.get("/v1/documents", headers={"Host": "evil.example:8000"})
        assert (evil.status_code, evil.json()["error"]["code"]) == (403, "forbidden_host")


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\nann:{ANN}\n")
    keys = ApiKeys.of(ServiceSettings.load(keys=file, api_keys="bob:" + "b" * 20))
    assert keys.tenant(ANN) == "ann" and keys.tenant("b" * 20) == "bob"
    assert keys.tenant("") is None and keys.tenant(ANN + "a") is None and len(keys) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ann:" + "a" * 20, "line 1 of .* is not name:key"),
        ("ann " + "a" * 20, "is not name:key"),
        ("ann:short", "has 5 characters: give at least 16"),
        ("# nobody", "but there are none"),
        (f"ann:{ANN}\nbob:{ANN}", "the same API key is given twice"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.of(ServiceSettings.load(keys=tmp_path / "keys"))
    assert ANN not in str(caught.value)


def test_a_public_address_needs_keys() -> None:
    with pytest.raises(ConfigError, match="there are no API keys: anybody could"):
        check_bind("0.0.0.0", ApiKeys())
    check_bind("0.0.0.0", ApiKeys(KEYS))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_bind(host, ApiKeys())


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot serve at 127.0.0.1:{port}: .* in use"):
            serve(Settings.load(store="nowhere"), ServiceSettings.load(port=port))


def test_what_is_not_there_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(response: Any) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["message"]

    with served(tmp_path / "store") as one, one.client(ANN) as ann:
        status, message = said(ann.get("/demo/nothing.js"))
        assert status == 404 and "the page is at /demo" in message
        status, message = said(ann.post("/v1/responses", json={}))
        assert status == 404 and "no route POST /v1/responses" in message
        assert "/v1/chat/completions" in message
        status, message = said(ann.get("/v1/query"))
        assert status == 405 and "no route GET /v1/query" in message
        status, message = said(ann.get("/v1/models/gpt"))
        assert status == 404 and "or 'ragcache'" in message
        document = {"data": "Oslo", "text": "Bexley"}
        chat = {"messages": [{"role": "user", "content": "Who?"}], "model": "ragcache"}
        status, message = said(
            ann.post("/v1/chat/completions", json=chat | {"documents": [document]})
        )
        assert status == 400 and "no other fields beside it" in message


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Name a file of lines name:key"):
        ApiKeys.of(ServiceSettings.load(keys=tmp_path / "none"))
    with scene.small(tmp_path / "store") as cache, pytest.raises(ConfigError, match="Name a file"):
        report_page.write_report(Path("/dev/full"), {}, cache)  # a disk without space


def test_stats_tell_of_the_vector_index(ann: httpx.Client) -> None:
    found = ann.get("/v1/stats").json()["index"]
    assert (found["kind"], found["recall"], found["measured"]) == ("flat", 1.0, None)
    assert found["vectors"] >= 0
