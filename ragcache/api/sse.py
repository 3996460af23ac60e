"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ragcache.api.bridge import unless_gone
from ragcache.api.errors import ClientGone, problem


class EventStream(Response):
    """One event for each thing that ``events`` gives, then ``[DONE]``.

    What they raise is an event too, with an error object, and the last: the status has gone out
    by then. ``ended`` is called in any case, with that error, or ClientGone, or None: a client that
    hangs up stops the events where they are.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any]],
        ended: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: Exception | None = ClientGone()  # until it is known to have gone otherwise
        try:
            failed = await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._ended(failed)

    async def _send(self, send: Send) -> Exception | None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        failed: Exception | None = None
        async with aclosing(self._events):
            try:
                async for event in self._events:
                    await _send(send, json.dumps(event, ensure_ascii=False))
            except Exception as error:
                failed = error
                await _send(send, json.dumps(problem(error).body()))
        if failed is None:
            await _send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})
        return failed


async def _send(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode(errors="replace")
    await send({"type": "http.response.body", "body": body, "more_body": True})
