"""Limits the number of open connections, and closes those that send no complete request in time.

A connection takes a file descriptor before its client is known. So there is a limit below the
number of descriptors that a process may open. Beyond it, a new connection closes the one that has
been without a complete request for longest; a connection with a request in progress is never
closed.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

_MIN, _MAX = 8, 10_000


def default_max_connections() -> int:
    """Half of the file descriptors that this process may open; stores and models need some too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX if soft == resource.RLIM_INFINITY else max(_MIN, min(_MAX, soft // 2))


def limited_protocol(limit: int, seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol for at most ``limit`` connections. Each has so many ``seconds`` to send a
    complete request, headers and body, from its start or its last response."""

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self.idle_since = self.loop.time()
            self._timer = self.loop.call_later(seconds, self._check_timeout)
            if len(self.connections) > limit:
                self._make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self.idle_since = self.loop.time()
            super().on_response_complete()

        @property
        def is_idle(self) -> bool:
            """Whether there is no complete request in progress."""
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def _check_timeout(self) -> None:
            left = self.idle_since + seconds - self.loop.time()
            if self.is_idle and left <= 0:
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(
                    left if left > 0 else seconds, self._check_timeout
                )

        def _make_room(self) -> None:
            others = (one for one in self.connections if isinstance(one, Connection))
            idle = (one for one in others if one is not self and one.is_idle)
            oldest = min(idle, key=lambda one: one.idle_since, default=self)
            oldest.transport.abort()
            self.connections.discard(oldest)

    return Connection
