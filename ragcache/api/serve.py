"""``ragcache serve``: from settings to a process that answers, and to its end."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from ragcache.api import logs
from ragcache.api.app import create_app
from ragcache.api.security import Keys, check_bind
from ragcache.api.service import Service
from ragcache.errors import ConfigError
from ragcache.settings import Settings

_REPLY_S = 5.0  # for the last words of what was given up


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for an address that must not be served at,
    before the model is loaded, and what :meth:`Service.open` raises."""
    keys = Keys.of(settings)
    check_bind(settings.host, keys)
    check_free(settings.host, settings.port)
    logs.configure()
    with Service.open(settings, queue=settings.queue, streams=settings.streams) as service:
        Server(service, keys).run()


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


class Server(uvicorn.Server):
    """Serves at ``host`` and ``port`` of the service's settings.

    At the end nothing new is taken, and what was begun may go on for ``grace_s``; then streams end
    with an error event, and whole answers with 503.
    """

    def __init__(self, service: Service, keys: Keys) -> None:
        self.service, settings = service, service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service, keys),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.grace_s + _REPLY_S),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self.service.settings.grace_s
        drained = asyncio.create_task(asyncio.to_thread(self.service.scheduler.close, grace))
        await super().shutdown(sockets)
        await drained
