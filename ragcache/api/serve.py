"""``ragcache serve``: from settings to a process that answers, and to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from ragcache.api import logs
from ragcache.api.app import create_app
from ragcache.api.connections import allowed, connection
from ragcache.api.middleware.security import Keys, check_bind
from ragcache.api.service import Service
from ragcache.errors import ConfigError, RagCacheError
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.tenants import tenant_folder

logger = logging.getLogger(__name__)

_REPLY_S = 5.0  # for the last words of what was given up
_AT_ONCE = 16  # connections that are accepted before any other can be closed
_IN_QUEUE = 2048  # connections that the kernel holds until they are accepted
#: For how long a thread keeps Python's lock from one that waits for it. The engine gives it away at
#: each of thousands of operations of a forward, and would wait for as long for every one of them
#: while documents are split: with Python's 5 ms, first tokens took three times as long.
_SWITCH_S = 0.0005


def serve(
    settings: Settings,
    service_settings: ServiceSettings,
    loading: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then the stores are closed. Raises ConfigError for an address
    that must not be served at, before the model is loaded, and what :meth:`Service.open` raises."""
    keys = Keys.of(service_settings)
    check_bind(service_settings.host, keys)
    check_free(service_settings.host, service_settings.port)
    logs.configure()
    sys.setswitchinterval(_SWITCH_S)
    with Service.open(settings, service_settings, loading=loading) as service:
        for warning in empty_stores(service, keys):
            logger.warning(warning)
        Server(service, keys, lambda url: print(f"the page is at {url}/demo", flush=True)).run()


def empty_stores(service: Service, keys: Keys) -> Iterator[str]:
    """Say whose questions find nothing, and which documents nobody can ask for."""
    store = service.own.settings.store
    for tenant in keys.tenants or [""]:
        try:
            there = tenant_folder(Path(store), tenant).exists()
            documents = service.cache(tenant).catalog.size[0] if there else 0
        except RagCacheError as error:
            yield f"the store of tenant {tenant or 'itself'!r} cannot be opened: {error}"
            continue
        if not documents:
            named = f" --tenant {tenant}" if tenant else ""
            whose = f"the store of tenant {tenant}" if tenant else "the store"
            yield (
                f"{whose} holds no documents, so its questions are answered from nothing: give it "
                f"some with `ragcache index PATH... --store {store}{named}` before serving, or "
                "POST /v1/documents"
            )
    own = service.own.catalog.size[0]
    if keys and "" not in keys.tenants and own:
        yield (
            f"the {own} documents of the store itself belong to no key, so nobody can ask for "
            "them: give them to one with a line .:KEY among the keys, or index them for a tenant "
            f"with `ragcache index PATH... --store {store} --tenant NAME`"
        )


def check_free(host: str, port: int) -> None:
    """Raise ConfigError where something else serves at that port, or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot serve at {host}:{port}: {error.strerror}. Give another --port, or 0 for "
                "any that is free."
            ) from error


def _lengthen(listening: int) -> None:
    """Let the kernel hold more connections than are accepted at a time. asyncio has one number for
    both; and those that it accepts in one go have a descriptor each, before any can be closed."""
    with socket.socket(fileno=os.dup(listening)) as same:
        same.listen(_IN_QUEUE)


class Server(uvicorn.Server):
    """Serves at ``host`` and ``port`` of the service's settings.

    ``listens`` is told the address once it does. At the end nothing new is taken, and what was
    begun may go on for ``grace_s``; then streams end with an error event, and whole answers with
    503. A signal ends :meth:`run`, not the process: whoever called it closes what it opened.
    """

    def __init__(
        self, service: Service, keys: Keys, listens: Callable[[str], None] = lambda url: None
    ) -> None:
        self.service, settings, self._listens = service, service.settings, listens
        most = settings.connections or allowed()
        super().__init__(
            uvicorn.Config(
                create_app(service, keys),
                http=connection(most, settings.read_s),
                backlog=max(1, min(_AT_ONCE, most // 2)),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.grace_s + _REPLY_S),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for listening in server.sockets:
                    _lengthen(listening.fileno())
            self._listens(self.url)

    @property
    def url(self) -> str:
        """Where it listens; of all addresses, the one on this machine."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # or they would end the process here

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self.service.settings.grace_s
        drained = asyncio.create_task(asyncio.to_thread(self.service.drain, grace))
        await super().shutdown(sockets)
        await drained
