"""``ragcache serve`` from start to end: its output, and that it closes what it opened."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ragcache.api.logs import JsonFormatter, RepeatFilter
from ragcache.api.middleware.auth import ApiKeys
from ragcache.api.serve import serve, store_warnings
from ragcache.errors import ConfigError
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from tests import scene
from tests.api.conftest import ANN, BOB, Served, served
from tests.api.scene import Held, small

ITSELF = "own-" + "o" * 32


def test_store_warnings_are_told_of(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        [none] = store_warnings(service, ApiKeys())
        assert none.startswith("the store holds no documents")
        service.default_cache.add(scene.DOCUMENTS)
        assert list(store_warnings(service, ApiKeys())) == []
        service.cache("bob").add(scene.DOCUMENTS[:1])
        ann, itself = store_warnings(service, ApiKeys([("ann", ANN), ("bob", BOB)]))
        assert (
            ann.startswith("the store of tenant ann holds no documents") and "--tenant ann" in ann
        )
        assert itself.startswith("the 3 documents of the store itself belong to no API key")
        assert list(store_warnings(service, ApiKeys([("", ANN), ("bob", BOB)]))) == []


def test_a_key_for_the_store_itself(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text(f".:{ITSELF}\nann:{ANN}\n")
    keys = ApiKeys.of(ServiceSettings.load(keys=file))
    assert keys.tenant(ITSELF) == "" and keys.tenants == ["", "ann"]
    with served(tmp_path / "store", keys=[("", ITSELF), ("ann", ANN)]) as one:
        one.service.default_cache.add(scene.DOCUMENTS)
        with one.client(ITSELF) as itself, one.client(ANN) as ann:
            assert len(itself.get("/v1/documents").json()["data"]) == 3
            assert ann.get("/v1/documents").json()["data"] == []


@pytest.mark.parametrize("keys", [(), [("ann", ANN)]])
def test_the_root_leads_to_the_page(tmp_path: Path, keys: object) -> None:
    with served(tmp_path, keys=keys) as one, one.client(None) as anybody:
        root = anybody.get("/")
        assert root.status_code == 307 and root.headers["Location"] == "/demo"
        assert anybody.get("/", follow_redirects=True).status_code == 200
        assert anybody.get("/demo/" + "a" * 256).status_code == 404
        assert anybody.get("/demo/%2e%2e%2fpage.py").status_code == 404
        assert anybody.get("/nowhere").status_code == (401 if keys else 404)
        assert one.server.url == one.url


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("[::1].evil.test", 403),
        ("[::1]:80.evil.test", 403),
        ("[::1", 403),
        ("127.0.0.1:80@evil.test", 403),
        ("localhost.evil.test", 403),
        ("evil.test", 403),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("LocalHost:1", 200),
        ("127.0.0.1", 200),
    ],
)
def test_hosts(open_: object, host: str, status: int) -> None:
    with open_.client(None) as client:  # type: ignore[attr-defined]
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> object:
    with served(tmp_path_factory.mktemp("open"), keys=()) as one:
        yield one


def half(one: Served) -> socket.socket:
    """A connection that sends half a request."""
    host, port = one.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=20)
    opened.sendall(b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\n")
    return opened


def closed(connection: socket.socket) -> bool:
    """Whether it is closed within the time that it waits for an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_half_requests_keep_nobody_out(tmp_path: Path) -> None:
    with served(tmp_path, keys=(), connections=8) as one, one.client(None) as client:
        assert client.get("/health").status_code == 200
        held = [half(one) for _ in range(40)]
        with one.client(None) as another:
            assert another.get("/health").status_code == 200
        until = time.monotonic() + 20
        while len(one.server.server_state.connections) > 8:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert closed(held[0])
        for connection in held:
            connection.close()


def test_a_request_that_does_not_end_is_closed(tmp_path: Path) -> None:
    with served(tmp_path, keys=(), read_s=0.2) as one:
        with half(one) as headers, half(one) as body:
            body.sendall(b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            assert closed(headers) and closed(body)


def test_an_answer_may_take_longer_than_its_request(tmp_path: Path) -> None:
    with served(tmp_path, keys=(), read_s=0.1) as one, one.client(None) as client:
        with Held(one.service.scheduler) as engine:
            timer = threading.Timer(0.5, engine.let_go)
            timer.start()
            assert client.post("/v1/query", json={"question": "Who?"}).status_code == 200
            timer.join()


def test_what_fails_again_is_said_once(tmp_path: Path) -> None:
    once, lines = RepeatFilter(seconds=0.2), JsonFormatter()

    def told(message: str, *args: object, level: int = logging.WARNING, **extra: object) -> str:
        record = logging.LogRecord("ragcache.access", level, "", 0, message, args, None)
        record.__dict__.update(extra)
        return lines.format(record) if once.filter(record) else ""

    assert told('{"a": "%s"}', 1) == '{"a": "1"}' and not told('{"a": "%s"}', 2)
    assert told('{"b": 1}') and told('{"c": 1}', level=logging.INFO)
    assert told('{"c": 1}', level=logging.INFO)
    assert told('{"d": 1}', level=logging.INFO, failure="401")
    assert not told('{"e": 1}', level=logging.INFO, failure="401")
    time.sleep(0.25)
    assert told('{"a": "%s"}', 3) == '{"a": "3", "repeated": 1}'


CHILD = """
import sys
from pathlib import Path
from ragcache.api import logs
from ragcache.api.middleware.auth import ApiKeys
from ragcache.api.serve import Server
from tests.api.scene import small

with small(Path(sys.argv[1]), host="127.0.0.1", port=0, grace_s=1.0) as service:
    Server(service, ApiKeys(), lambda url: print(url, flush=True)).run()
print("closed", service.default_cache.store.tables._closed, flush=True)
"""


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_stores(tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith(b"http://127.0.0.1:")
        began = time.monotonic()
        child.send_signal(how)
        assert child.stdout.readline() == b"closed True\n"
        assert child.wait(20) == 0 and time.monotonic() - began < 10


def test_the_model_is_named_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def load(*_: object, loading: Callable[[str], None], **__: object) -> None:
        loading("the model")
        raise ConfigError("not loaded here")

    monkeypatch.setattr("ragcache.api.logs.configure", lambda: None)
    monkeypatch.setattr(RagCache, "open", load)
    with pytest.raises(ConfigError, match="not loaded here"):
        serve(Settings.load(store=tmp_path), ServiceSettings.load(port=0), said.append)
    assert said == ["the model"]
