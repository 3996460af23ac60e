"""The service under load, past deadlines, without clients, and while it shuts down."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from ragcache.api.ticket_queue import Ticket
from ragcache.blend import BLENDERS
from ragcache.store.lmdb import environment
from tests import scene
from tests.api.conftest import ANN, BOB, Served, served
from tests.api.scene import Held

LONG = {"question": "Where does Mira Holt live?", "max_tokens": 400, "mode": "full"}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose answers end at their length only."""
    with served(tmp_path_factory.mktemp("endless"), queue=200, grace_s=0.5) as one:
        engine: Any = one.service.default_cache.engine
        engine.model.generation_config.eos_token_id = None
        engine.tokenizer.eos_token = None
        yield one
        engine.tokenizer.eos_token = "<eos>"  # other tests have the same one


def hang_up(url: str, body: dict[str, Any], *, after: bytes) -> None:
    """Ask, and leave as soon as ``after`` has been answered; at once where that is nothing."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/query HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ANN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as asking:
        asking.sendall(head.encode() + data)
        seen = b""
        while after not in seen:
            seen += asking.recv(4096)


def idle(one: Served, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while one.service.scheduler.depth() != (0, 0):
        assert time.monotonic() < until, one.service.scheduler.depth()
        time.sleep(0.005)


def test_work_stops_when_clients_hang_up(endless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of them, half streaming: no ticket passes a second look at whether it was given up."""
    checks, check = Counter[Ticket](), Ticket.check

    def counted(ticket: Ticket) -> None:
        if ticket._cancelled:
            checks[ticket] += 1
        check(ticket)

    with endless.client() as client:
        client.post("/v1/query", json=LONG | {"max_tokens": 1}).raise_for_status()
        threads = threading.active_count()
        monkeypatch.setattr(Ticket, "check", counted)
        asking = [
            threading.Thread(
                target=hang_up,
                args=(endless.url, LONG | {"stream": bool(number % 2)}),
                kwargs={"after": b"delta" if number % 2 else b""},
            )
            for number in range(100)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        idle(endless)
        assert checks and max(checks.values()) == 1
        assert threading.active_count() <= threads
        monkeypatch.setattr(environment, "_LONG_S", -1.0)
        assert not any(cache.store.tables.long_readers() for cache in endless.service.caches())
        assert client.post("/v1/query", json=LONG | {"max_tokens": 1}).status_code == 200
        assert "ragcache_given_up_total 100.0" in client.get("/metrics").text


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    with served(tmp_path, queue=1, streams=1) as one, ExitStack() as stack:
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            go.wait(30)

        one.service.cache("bob")
        one.service.scheduler.call(hold)
        held.wait(10)
        ann, bob = stack.enter_context(one.client(ANN)), stack.enter_context(one.client(BOB))
        body = {"question": "Who?", "mode": "full"}
        waiting = [
            threading.Thread(target=c.post, args=("/v1/query",), kwargs={"json": body})
            for c in (ann, bob)
        ]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + 10
        while one.service.scheduler.depth()[0] < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        with one.client(ANN) as again:
            refused = again.post("/v1/query", json=body)
        go.set()
        for thread in waiting:
            thread.join()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_deadline(tmp_path: Path, stream: bool) -> None:
    with served(tmp_path, timeout_s=0.05) as one, one.client() as client:
        one.service.cache("ann")
        with Held(one.service.scheduler):
            response = client.post("/v1/query", json=LONG | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (
            504,
            "deadline_exceeded",
        )


def test_at_the_end_streams_are_told(tmp_path: Path) -> None:
    with served(tmp_path, grace_s=0.2) as one, one.client() as client:
        engine: Any = one.service.default_cache.engine
        slow, following = threading.Event(), engine._forward_logits

        def slowly(*args: Any) -> Any:
            slow.wait(0.1)
            return following(*args)

        engine._forward_logits = slowly
        body = LONG | {"stream": True, "temperature": 1, "seed": 1}
        with client.stream("POST", "/v1/query", json=body) as response:
            lines = response.iter_lines()
            assert "delta" in next(lines)
            one.server.should_exit = True
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "closing"


def test_what_was_begun_is_finished_at_the_end(tmp_path: Path) -> None:
    with served(tmp_path) as one, one.client() as client:
        body = LONG | {"stream": True, "max_tokens": 50}
        with client.stream("POST", "/v1/query", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            one.server.should_exit = True
            assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("layout", ["records", "files"])
@pytest.mark.parametrize("tier", [0, 1 << 24], ids=["disk", "tier"])
def test_own_chunks_hit_and_anothers_miss_in_every_mode(
    tmp_path: Path, layout: str, tier: int
) -> None:
    text = scene.DOCUMENTS[0].text
    with served(tmp_path, layout=layout, ram_bytes=tier) as one, ExitStack() as stack:
        ann, bob = stack.enter_context(one.client(ANN)), stack.enter_context(one.client(BOB))
        for number, mode in enumerate(sorted(set(BLENDERS) - {"full", "prefix", "cachecraft"})):
            mine = f"{text} {number}"
            ann.post("/v1/chunks", json={"chunks": [mine, "Another."]}).raise_for_status()
            assert misses(ann, mode, [mine, "Another."]) == [None, None], mode
            assert misses(bob, mode, [mine, "Another."])[0] in ("absent", "encoded"), mode
        for mode in ("prefix", "cachecraft"):  # what they reuse, prompts leave
            first = misses(ann, mode, [text, "Another."])
            one.settle()
            again = misses(ann, mode, [text, "Another."])
            assert None not in first and again == [None, None], mode
            assert None not in misses(bob, mode, [text, "Another."]), mode


def misses(client: httpx.Client, mode: str, texts: list[str]) -> list[Any]:
    body = {
        "model": "ragcache",
        "messages": [{"role": "user", "content": "Who?"}],
        "documents": texts,
        "max_tokens": 1,
        "ragcache": {"mode": mode},
    }
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return [chunk["miss"] for chunk in response.json()["ragcache"]["chunks"]]
