"""Between an event loop, where clients wait, and the engine's thread, where answers are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

from ragcache.api.errors import ClientGone
from ragcache.api.scheduler import TooLate
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.types import Answer

T = TypeVar("T")
_LATE_S = 0.5  # a step may hold the engine beyond a deadline; its asker waits no longer


class Asked:
    """A submitted question, as its HTTP handler sees it. Raises Busy or Closing.

    Whoever stops reading :meth:`pieces` early, in whatever way, gives the question up: call
    :meth:`give_up` where they may never be read.
    """

    def __init__(self, service: Service, tenant: str, ask: Request, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._first: tuple[str, Any] | None = None
        self._until = loop.time() + seconds + _LATE_S
        self.answer: Answer | None = None
        self.no_chunks: str | None = None  # why there are none, known once it has begun

        def told(kind: str, value: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

        self.ticket = service.ask(tenant, ask, told, seconds=seconds, without=self._without)

    def _without(self, why: str) -> None:
        self.no_chunks = why

    def give_up(self) -> None:
        self.ticket.give_up()

    @property
    def queued_s(self) -> float:
        """How long it waited for its turn."""
        return (self.ticket.begun or self.ticket.queued) - self.ticket.queued

    async def begun(self) -> None:
        """Wait for the first piece. Raises what is wrong with the question, while the answer can
        still be an error."""
        try:
            self._first = await self._next()
        except BaseException:
            self.give_up()
            raise

    async def pieces(self) -> AsyncGenerator[str]:
        """The answer's text as it comes; ``answer`` once it is through. Raises what ended it."""
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
            self.give_up()

    async def whole(self) -> Answer:
        """The finished answer."""
        async for _ in self.pieces():
            pass
        assert self.answer is not None
        return self.answer

    async def _next(self) -> tuple[str, Any]:
        try:
            async with asyncio.timeout_at(self._until):
                kind, value = await self._events.get()
        except TimeoutError:
            raise TooLate from None
        if kind == "failed":
            raise value
        return kind, value


async def awaited(receive: Receive, work: Future[T]) -> T:
    """Wait for work on the engine's thread; cancel it if the client hangs up
    (:func:`unless_gone`)."""

    async def done() -> T:
        return await asyncio.wrap_future(work)

    return await unless_gone(receive, done())


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` gives. If the client hangs up first, cancel it and raise ClientGone.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
