"""Refuses paths that routing would change.

Routing ignores a newline at the end of a path, and replaces bytes that are not UTF-8. Either way an
id in the path could name another document than the client meant.
"""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from ragcache.api.errors import ApiError


class PathCheck:
    """Responds with 400 to a path that has control characters or is not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_exact(scope):
            message = (
                "the path has control characters, or is not UTF-8, which no id may: to delete a "
                "document of an earlier release with such an id, use `ragcache delete`"
            )
            return await ApiError(400, message).response()(scope, receive, send)
        await self.app(scope, receive, send)


def _is_exact(scope: Scope) -> bool:
    try:
        path = unquote_to_bytes(scope["raw_path"]).decode()
    except UnicodeDecodeError:
        return False
    return not any(unicodedata.category(character) == "Cc" for character in path)
