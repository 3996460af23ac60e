"""``ragcache serve``: starts the service from settings, and shuts it down in order."""

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
from ragcache.api.connection_limit import default_max_connections, limited_protocol
from ragcache.api.middleware.auth import ApiKeys, check_bind
from ragcache.api.service import Service
from ragcache.errors import ConfigError, RagCacheError
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.tenants import tenant_folder

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_REPLY_S = 5.0  # for the error responses to requests that were cancelled at the end
_ACCEPT_BATCH = 16  # connections that asyncio accepts before it can close others
_BACKLOG = 2048  # connections that the kernel holds until they are accepted
#: Python's thread switch interval. The engine releases Python's lock at each of the thousands of
#: operations of a forward pass, and waits up to this long to get it back while documents are split:
#: with Python's default of 5 ms, first tokens took three times as long.
_SWITCH_INTERVAL_S = 0.0005


def serve(
    settings: Settings,
    service_settings: ServiceSettings,
    loading: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then close the stores.

    Raises ConfigError, before the model is loaded, for an address that is not allowed or not free;
    also what :meth:`Service.open` raises.
    """
    keys = ApiKeys.of(service_settings)
    check_bind(service_settings.host, keys)
    _check_port_free(service_settings.host, service_settings.port)
    logs.configure()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with Service.open(settings, service_settings, loading=loading) as service:
        for warning in store_warnings(service, keys):
            logger.warning(warning)
        Server(service, keys, lambda url: print(f"the page is at {url}/demo", flush=True)).run()


def store_warnings(service: Service, keys: ApiKeys) -> Iterator[str]:
    """Warnings about tenants without documents, and about documents that no API key can reach."""
    store = service.default_cache.settings.store
    for tenant in keys.tenants or [""]:
        try:
            exists = tenant_folder(Path(store), tenant).exists()
            documents = service.cache(tenant).catalog.size[0] if exists else 0
        except RagCacheError as error:
            yield f"the store of tenant {tenant or 'itself'!r} cannot be opened: {error}"
            continue
        if not documents:
            named = f" --tenant {tenant}" if tenant else ""
            whose = f"the store of tenant {tenant}" if tenant else "the store"
            yield (
                f"{whose} holds no documents, so its questions are answered without any: add "
                f"some with `ragcache index PATH... --store {store}{named}` before serving, or "
                "POST /v1/documents"
            )
    default = service.default_cache.catalog.size[0]
    if keys and "" not in keys.tenants and default:
        yield (
            f"the {default} documents of the store itself belong to no API key, so no client can "
            "reach them: add a line .:KEY to the keys, or index them for a tenant with "
            f"`ragcache index PATH... --store {store} --tenant NAME`"
        )


def _check_port_free(host: str, port: int) -> None:
    """Raise ConfigError if the port is in use, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot serve at {host}:{port}: {error.strerror}. Give another --port, or 0 for "
                "any free one."
            ) from error


def _set_backlog(listening: int) -> None:
    """Let the kernel hold more connections than asyncio accepts at a time. asyncio has one number
    for both, and each connection that it accepts in one batch has a descriptor before any other can
    be closed."""
    with socket.socket(fileno=os.dup(listening)) as same:
        same.listen(_BACKLOG)


class Server(uvicorn.Server):
    """Serves at ``host`` and ``port`` of the service's settings.

    ``on_listening`` is called with the URL once the server listens. At the end no new requests are
    accepted, and running ones may take ``grace_s`` more; then streams end with an error event, and
    other responses are 503. A signal ends :meth:`run`, not the process, so that the caller can
    close what it opened.
    """

    def __init__(
        self,
        service: Service,
        keys: ApiKeys,
        on_listening: Callable[[str], None] = lambda url: None,
    ) -> None:
        self.service, settings, self._on_listening = service, service.settings, on_listening
        limit = settings.connections or default_max_connections()
        super().__init__(
            uvicorn.Config(
                create_app(service, keys),
                http=limited_protocol(limit, settings.read_s),
                backlog=max(1, min(_ACCEPT_BATCH, limit // 2)),
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
                    _set_backlog(listening.fileno())
            self._on_listening(self.url)

    @property
    def url(self) -> str:
        """The URL at which it listens; the loopback address if it listens at all addresses."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # uvicorn would raise them again

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self.service.settings.grace_s
        drained = asyncio.create_task(asyncio.to_thread(self.service.drain, grace))
        await super().shutdown(sockets)
        await drained
