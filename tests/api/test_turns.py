"""Additions of documents take turns, in bounded queues and with deadlines, and no request keeps
other tenants from the engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from ragcache.api.ticket_queue import DeadlineExceeded, QueueFull, RequestCancelled, ShuttingDown
from ragcache.core.indexing import Added
from ragcache.core.request import Request
from ragcache.errors import ContextError
from ragcache.types import Chunk, Document
from tests.api.conftest import ANN, BOB, served
from tests.api.scene import SOON, Heard, Held, given, small


def texts(name: str, count: int = 3) -> list[Document]:
    return [Document(f"{name}{n}", f"Text {n} of {name}.") for n in range(count)]


def test_a_flood_of_one_tenants_documents_keeps_no_other_waiting(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        order: list[str] = []

        def add(tenant: str, name: str) -> Future[Added]:
            done = service.add(tenant, texts(name))
            done.add_done_callback(lambda _: order.append(tenant))
            return done

        with Held(service.scheduler):
            every = [add("ann", f"a{n}.") for n in range(30)]
            until = time.monotonic() + SOON
            while service.scheduler.count_background("ann") < 30:  # split, all of them
                assert time.monotonic() < until
                time.sleep(0.005)
            every.append(add("bob", "b."))
            while not service.scheduler.count_background("bob"):
                assert time.monotonic() < until
                time.sleep(0.005)
            ready = service.scheduler.call(lambda: order.append("/ready"), tenant="/ready")
        ready.result(SOON)
        wait(every, SOON)
        assert all(one.result(0).documents == 3 for one in every)
        assert order.index("bob") <= 3 and order.index("/ready") <= 2


def test_a_tenants_queue_is_bounded(tmp_path: Path) -> None:
    with small(tmp_path, queue=4) as service:
        with Held(service.scheduler):
            every = [service.add("ann", texts(f"a{n}.")) for n in range(4)]
            with pytest.raises(QueueFull, match="4 pieces of work are waiting already"):
                for n in range(4, 9):
                    every.append(service.add("ann", texts(f"a{n}.")))
            every.append(service.add("bob", texts("b.")))
        wait(every, SOON)
        assert all(one.result(0) for one in every)


def test_it_is_said_over_http(tmp_path: Path) -> None:
    body = {"documents": [{"id": "a", "text": "A text."}]}
    with served(tmp_path, queue=1, timeout_s=0.3) as one, one.client(ANN) as ann:
        with one.client(BOB) as bob, Held(one.service.scheduler):
            found: list[Any] = []
            first = threading.Thread(
                target=lambda: found.append(ann.post("/v1/documents", json=body))
            )
            first.start()
            until = time.monotonic() + SOON
            while not one.service.scheduler.count_background("ann"):
                assert time.monotonic() < until
                time.sleep(0.002)
            refused = bob.post("/v1/chunks", json={"chunks": ["A text."]})
            assert refused.status_code == 504  # the engine stands still: its time is over
            first.join()
        [late] = found
        assert late.json()["error"]["code"] == "deadline_exceeded"


def test_work_has_a_deadline_and_can_be_cancelled(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        with Held(service.scheduler):
            late = service.add("ann", texts("a"), seconds=0.05)
            assert isinstance(late.exception(SOON), DeadlineExceeded)
            gone = service.add("ann", texts("b"))
            assert gone.cancel()
        service.add("ann", texts("c")).result(SOON)
        assert {entry.id[0] for entry in service.cache("ann").documents()} == {"c"}


def test_at_the_end_what_was_not_begun_is_given_up(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        with Held(service.scheduler):
            waiting = [service.add("ann", texts(f"a{n}.")) for n in range(9)]
            closing = threading.Thread(target=service.close)
            closing.start()
            assert all(
                isinstance(one.exception(SOON), RequestCancelled | ShuttingDown) for one in waiting
            )
        closing.join(SOON)
        assert not closing.is_alive()


def test_splitting_keeps_nobody_from_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path) as service:
        splitter, stands, go = (
            service.cache("ann").indexing.splitter,
            threading.Event(),
            list[bool](),
        )
        split = type(splitter).chunks

        def endless(self: Any, document: Document) -> Any:
            if document.id != "long0":
                yield from split(self, document)
                return
            stands.set()
            while not go:
                yield Chunk(document.id, 0, "A text.")

        monkeypatch.setattr(type(splitter), "chunks", endless)
        long = service.add("ann", texts("long", 1))
        assert stands.wait(SOON)
        assert service.add("bob", texts("b")).result(SOON).documents == 3
        heard = Heard()
        service.submit("bob", Request("Which text?"), heard)
        assert heard.end() == "done"
        assert long.cancel()
        until = time.monotonic() + SOON
        while service.split_scheduler.count_background("ann"):  # it ends at its next piece
            assert time.monotonic() < until
            time.sleep(0.002)


@pytest.mark.parametrize(
    "what", ["question", "chat", "instructions", "chunk", "many", "search", "store"]
)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with small(tmp_path) as service:
        service.default_cache.add(texts("a"))
        monkeypatch.setattr(service.default_cache.engine, "tokenize", lambda *_, **__: 1 // 0)
        monkeypatch.setattr(service.default_cache.retriever, "retrieve", lambda *_, **__: 1 // 0)
        long = "a" * (
            service.default_cache.engine.context_tokens * service.default_cache.engine.token_bytes
            + 1
        )
        if what == "search":
            with pytest.raises(ContextError, match="cannot fit: llama has a context of 512"):
                service.search("", long).result(SOON)
            return
        if what == "store":
            with pytest.raises(ContextError, match="cannot fit"):
                service.precompute("", given(long))
            return
        ask = {
            "question": Request(long),
            "chat": Request(messages=[{"role": "user", "content": long}]),
            "instructions": Request("Who?", instructions=long),
            "chunk": Request("Who?", chunks=given(long)),
            "many": Request("Who?", chunks=given(*["a"] * 600)),
        }[what]
        heard = Heard()
        service.submit("", ask, heard)
        assert heard.end() == "ContextError"
