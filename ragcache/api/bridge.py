"""Connects the event loop, where HTTP handlers wait, to the engine's thread, which generates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

from ragcache.api.errors import ClientDisconnected
from ragcache.api.service import Service
from ragcache.api.ticket_queue import DeadlineExceeded
from ragcache.core.request import Request
from ragcache.types import Answer

_T = TypeVar("_T")
_GRACE_S = 0.5  # a step may occupy the engine beyond a deadline; the client waits this much longer


class AnswerStream:
    """The answer to a submitted request, as its HTTP handler reads it.

    Raises QueueFull or ShuttingDown. Ending the iteration over :meth:`pieces` early, for whatever
    reason, cancels the request; call :meth:`cancel` if the pieces may never be read.
    """

    def __init__(self, service: Service, tenant: str, request: Request, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._first: tuple[str, Any] | None = None
        self._until = loop.time() + seconds + _GRACE_S
        self.answer: Answer | None = None
        self.no_chunks: str | None = None  # why the prompt has no chunks; set by :meth:`started`

        def on_event(kind: str, value: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
                loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

        self.ticket = service.submit(
            tenant, request, on_event, seconds=seconds, on_no_chunks=self._set_no_chunks
        )

    def _set_no_chunks(self, reason: str) -> None:
        self.no_chunks = reason

    def cancel(self) -> None:
        self.ticket.cancel()

    @property
    def queued_s(self) -> float:
        """Seconds that the request waited for the engine."""
        return (self.ticket.started_at or self.ticket.queued_at) - self.ticket.queued_at

    async def started(self) -> None:
        """Wait for the first piece. Raises the request's error while the HTTP status can still be
        that of an error."""
        try:
            self._first = await self._next()
        except BaseException:
            self.cancel()
            raise

    async def pieces(self) -> AsyncGenerator[str]:
        """The answer's text as it is generated; ``answer`` is set afterwards. Raises the error that
        ended the request."""
        try:
            while True:
                kind, value = self._first or await self._next()
                self._first = None
                if kind == "done":
                    return
                if isinstance(value, Answer):
                    self.answer = value
                else:
                    yield value
        finally:
            self.cancel()

    async def collect(self) -> Answer:
        """Wait for the whole answer."""
        async for _ in self.pieces():
            pass
        assert self.answer is not None
        return self.answer

    async def _next(self) -> tuple[str, Any]:
        try:
            async with asyncio.timeout_at(self._until):
                kind, value = await self._events.get()
        except TimeoutError:
            raise DeadlineExceeded from None
        if kind == "failed":
            raise value
        return kind, value


async def wait_for_future(receive: Receive, future: Future[_T]) -> _T:
    """Wait for the engine's thread; if the client disconnects, cancel the future and raise
    ClientDisconnected."""

    async def result() -> _T:
        return await asyncio.wrap_future(future)

    return await cancel_on_disconnect(receive, result())


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``. If the client disconnects first, cancel it and raise
    ClientDisconnected.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
