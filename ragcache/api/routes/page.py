"""``/demo``: a static page that needs no API key and asks its user for one."""

from __future__ import annotations

import mimetypes

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse

from ragcache.api.errors import ApiError
from ragcache.api.report_page import STATIC

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/")
async def root() -> RedirectResponse:
    """Redirect to the page."""
    return RedirectResponse("/demo")


@router.get("/demo")
@router.get("/demo/{file}")
def demo(file: str = "index.html") -> Response:
    served = {one.name: one for one in STATIC.iterdir() if one.is_file() and one.name[0] != "."}
    if file not in served:
        raise ApiError(404, "the page has no such file: the page is at /demo", code="not_found")
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    return Response(served[file].read_bytes(), media_type=kind, headers=_HEADERS)
