"""A service over the small random model, on a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ragcache.api.errors import ApiError
from ragcache.api.middleware.auth import ApiKeys
from ragcache.api.scheduler import Scheduler
from ragcache.api.serve import Server
from ragcache.api.service import Service
from ragcache.api.ticket_queue import QueueFull
from tests import scene
from tests.api.scene import NewThreads, told_apart
from tests.errors import MET

ANN, BOB = "ann-" + "a" * 32, "bob-" + "b" * 32
MET.watch(ApiError)
MET.watch(QueueFull)

KEYS = [("ann", ANN), ("bob", BOB)]


@pytest.fixture
def new_threads() -> NewThreads:
    """Names of this package's threads that were begun since the test was, and are alive.

    Those of other tests' chat models may be alive too: they go with the last reference to them.
    """
    before = set(threading.enumerate())

    def since() -> set[str]:
        mine = (t.name for t in threading.enumerate() if t not in before)
        return {name for name in mine if name.startswith("ragcache")}

    return since


@contextmanager
def served(path: Path, keys: Any = KEYS, **settings: Any) -> Iterator[Served]:
    """A server in a thread, at a port that was free."""
    limits, rest = told_apart({"port": 0, "grace_s": 5.0, **settings})
    own = scene.small(path, store=path, **rest)
    scheduler = Scheduler(queue=limits.queue, streams=limits.streams)
    with serving(Service(own, scheduler, settings=limits), keys) as running:
        yield running


@contextmanager
def serving(service: Service, keys: Any) -> Iterator[Served]:
    """The same for any service, which is closed at the end."""
    with service:
        server = Server(service, ApiKeys(keys))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive() and time.monotonic() < until
                time.sleep(0.01)
            yield Served(server, service)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


class Served:
    """A running server, and clients of it."""

    def __init__(self, server: Server, service: Service) -> None:
        self.server, self.service = server, service
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    @property
    def app(self) -> Any:
        return self.server.config.app

    def settle(self) -> None:
        """Wait until what answers have left to be stored is stored."""
        self.service.scheduler.call(lambda: None).result(timeout=30)

    def client(self, key: str | None = ANN) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Shared by a module's tests; ann has the scene's documents."""
    with served(tmp_path_factory.mktemp("served")) as one:
        documents = [{"id": d.id, "text": d.text} for d in scene.DOCUMENTS]
        with one.client() as ann:
            ann.post("/v1/documents", json={"documents": documents}).raise_for_status()
        yield one


@pytest.fixture
def clients(running: Served) -> Iterator[Callable[..., httpx.Client]]:
    """Clients that are closed at the end."""
    with ExitStack() as stack:
        yield lambda key=ANN: stack.enter_context(running.client(key))


@pytest.fixture
def ann(clients: Callable[..., httpx.Client]) -> httpx.Client:
    return clients(ANN)


@pytest.fixture
def bob(clients: Callable[..., httpx.Client]) -> httpx.Client:
    return clients(BOB)
