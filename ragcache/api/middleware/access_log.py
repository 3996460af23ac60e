"""Around every request: an id, one line in the log, one count, and a trace where there is one.

The line is JSON, on the logger ``ragcache.access``. Routes add what they know to
``scope["state"]["log"]``; no text of documents, questions or answers, unless the settings say
``log_text``.
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

from ragcache.api.errors import problem
from ragcache.api.metrics import Metrics

logger = logging.getLogger("ragcache.access")
errors = logging.getLogger(__name__)

ID = "X-Request-Id"
_SOUND = re.compile(r"[A-Za-z0-9._-]{1,64}")  # what may come into a log from a client


class Watched:
    """The outermost layer: no exception goes through it, and every answer has an id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(ID, "")
        name = given if _SOUND.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=name, log=log)
        began, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[ID] = name
            await send(message)

        with _span(scope["method"]) as span:
            try:
                await self.app(scope, receive, sent)
            except Exception as error:
                errors.exception("request %s has failed", name)
                if not status:
                    await problem(error).response()(scope, receive, sent)
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
        refused = line["tenant"] is None  # before it was known who asks
        failure = {"failure": str(line["status"])} if refused else None
        logger.info(json.dumps(line, ensure_ascii=True), extra=failure)


@contextmanager
def _span(method: str) -> Iterator[Any]:
    """A span of OpenTelemetry, where that is installed; call what is yielded with its name and
    attributes."""
    try:
        from opentelemetry import trace
    except ImportError:
        yield lambda name, attributes: None
        return
    tracer = trace.get_tracer("ragcache")
    with tracer.start_as_current_span(method, kind=trace.SpanKind.SERVER) as span:

        def named(name: str, attributes: dict[str, Any]) -> None:
            span.update_name(name)
            for key, value in attributes.items():
                if value is not None:
                    span.set_attribute(f"ragcache.{key}", value)

        yield named
