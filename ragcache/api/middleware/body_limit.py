"""Limits the length of request bodies."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragcache.api.errors import ApiError


class BodyLimit:
    """Responds with 413 to a body of more than ``max_bytes``, with or without a Content-Length, and
    does not read the rest of it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the body is longer than {self.max_bytes} bytes: send less at a time"
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            refused = ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
            return await refused.response()(scope, receive, send)
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, message)  # FastAPI passes no other exception on from here
            return part

        await self.app(scope, receive_counted, send)
