"""``/demo``: the page, which is the same for everybody and asks for a key itself."""

from __future__ import annotations

import mimetypes
from importlib import resources

from fastapi import APIRouter, Response

from ragcache.api.problems import Problem

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/demo")
@router.get("/demo/{file}")
def demo(file: str = "index.html") -> Response:
    found = resources.files("ragcache.api").joinpath("static", file)
    if file.startswith(".") or not found.is_file():
        raise Problem(404, f"there is no {file!r} of the page: it is at /demo", code="not_found")
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    return Response(found.read_bytes(), media_type=kind, headers=_HEADERS)
