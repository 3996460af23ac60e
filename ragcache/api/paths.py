"""Paths of requests, exactly as they were sent.

What routes is lenient: a newline at the end of a path is passed over, and bytes that are no UTF-8
become a character of their own. Either way an id would name another document than the one that was
meant. So such paths are refused before they are routed.
"""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from ragcache.api.errors import Problem


class ExactPaths:
    """400 for a path that has control characters, or is not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_exact(scope):
            message = (
                "the path has control characters, or is not UTF-8: no id here has any, and "
                "`ragcache delete` deletes documents that an earlier release has called so"
            )
            return await Problem(400, message).response()(scope, receive, send)
        await self.app(scope, receive, send)


def _is_exact(scope: Scope) -> bool:
    try:
        path = unquote_to_bytes(scope["raw_path"]).decode()
    except UnicodeDecodeError:
        return False
    return not any(unicodedata.category(character) == "Cc" for character in path)
