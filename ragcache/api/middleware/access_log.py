"""Gives every HTTP request an id, a line in the access log, a count, and a span of OpenTelemetry if
that is installed.

The line is JSON, on the logger ``ragcache.access``. Routes add fields to ``scope["state"]["log"]``.
The line has no text of documents, questions or answers unless the setting ``log_text`` is on.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragcache.api.errors import as_api_error
from ragcache.api.metrics import Metrics

_access_logger = logging.getLogger("ragcache.access")
_logger = logging.getLogger(__name__)

_REQUEST_ID = "X-Request-Id"
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # ids that are logged as a client sends them


class AccessLog:
    """The outermost middleware: no exception passes it, and every response has an id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        header = Headers(scope=scope).get(_REQUEST_ID, "")
        name = header if _VALID_ID.fullmatch(header) else f"req-{secrets.token_hex(12)}"
        log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=name, log=log)
        began, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID] = name
            await send(message)

        with _span(scope["method"]) as span:
            try:
                await self.app(scope, receive, send_with_id)
            except Exception as error:
                _logger.exception("request %s failed", name)
                if not status:
                    await as_api_error(error).response()(scope, receive, send_with_id)
            route = getattr(scope.get("route"), "path", "none")
            line = {
                "time": round(time.time(), 3),
                "request": name,
                "tenant": scope["state"].get("tenant"),
                "method": scope["method"],
                "route": route,
                "status": log.pop("status", status),
                "ms": round(1000 * (time.perf_counter() - began), 1),
                **log,
            }
            span(f"{scope['method']} {route}", line)
        self.metrics.requests.labels(route, str(line["status"])).inc()
        refused = line["tenant"] is None  # before the client was known
        failure = {"failure": str(line["status"])} if refused else None
        _access_logger.info(json.dumps(line, ensure_ascii=True), extra=failure)


@contextmanager
def _span(method: str) -> Iterator[Any]:
    """A span of OpenTelemetry, if that is installed. Call the yielded function with the span's name
    and attributes."""
    try:
        from opentelemetry import trace
    except ImportError:
        yield lambda name, attributes: None
        return
    tracer = trace.get_tracer("ragcache")
    with tracer.start_as_current_span(method, kind=trace.SpanKind.SERVER) as span:

        def set_span(name: str, attributes: dict[str, Any]) -> None:
            span.update_name(name)
            for key, value in attributes.items():
                if value is not None:
                    span.set_attribute(f"ragcache.{key}", value)

        yield set_span
