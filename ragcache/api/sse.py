"""Server-sent events in the form that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ragcache.api.bridge import cancel_on_disconnect
from ragcache.api.errors import ClientDisconnected, as_api_error


class EventStream(Response):
    """Sends one event for each item of ``events``, then ``[DONE]``.

    An exception of ``events`` is sent as a last event with an error object, since the HTTP status
    has been sent by then. If the client disconnects, ``events`` is closed. ``on_end`` is always
    called: with that exception, with ClientDisconnected, or with None.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any]],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: Exception | None = ClientDisconnected()  # unless it ends otherwise
        try:
            failed = await cancel_on_disconnect(receive, self._send(send))
        except ClientDisconnected:
            pass
        finally:
            self._on_end(failed)

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
                await _send(send, json.dumps(as_api_error(error).body()))
        if failed is None:
            await _send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})
        return failed


async def _send(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode(errors="replace")
    await send({"type": "http.response.body", "body": body, "more_body": True})
