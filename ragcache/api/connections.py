"""Connections of whoever: so many at a time, and closed where no whole request comes in time.

A connection costs a descriptor before anything is known of who opened it. So there are at most
``most``, fewer than a process may have: where one more comes, the one goes that has been without a
whole request for longest. Someone who asks and gets an answer is never that one.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

_LEAST, _MOST = 8, 10_000


def allowed() -> int:
    """Half of the descriptors that this process may open; stores and models need some too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(_LEAST, min(_MOST, soft // 2))


def connection(most: int, seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, for at most so many connections, each of which has so many seconds to
    send a request, headers and body, from its start or the answer before."""

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self.since = self.loop.time()
            self._timer = self.loop.call_later(seconds, self._look)
            if len(self.connections) > most:
                self._make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self.since = self.loop.time()
            super().on_response_complete()

        @property
        def waits(self) -> bool:
            """Whether there is no whole request that is not answered yet."""
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def _look(self) -> None:
            left = self.since + seconds - self.loop.time()
            if self.waits and left <= 0:
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(left if left > 0 else seconds, self._look)

        def _make_room(self) -> None:
            others = (one for one in self.connections if isinstance(one, Connection))
            waiting = (one for one in others if one is not self and one.waits)
            oldest = min(waiting, key=lambda one: one.since, default=self)
            oldest.transport.abort()
            self.connections.discard(oldest)

    return Connection
