"""Bodies that are too long are not read to their end."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragcache.api.errors import Problem


class BodyLimit:
    """413 for a body of more than ``most`` bytes, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"the body is longer than {self.most} bytes: send less at a time"
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.most:
            refused = Problem(413, message, code="body_too_large", headers={"Connection": "close"})
            return await refused.response()(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, message)  # of all errors, what FastAPI hands on
            return part

        await self.app(scope, counted, send)
