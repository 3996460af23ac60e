"""Errors as OpenAI's error objects: ``{"error": {message, type, param, code}}``.

| status | code | when |
|---|---|---|
| 400 | ``invalid_request``, ``context_length_exceeded`` | the request cannot be answered |
| 401, 403 | ``invalid_api_key``, ``forbidden_host`` | see middleware/auth.py |
| 404, 405 | ``not_found``, ``model_not_found``, ``method_not_allowed`` | no such resource |
| 413 | ``body_too_large`` | the body is longer than the limit |
| 422 | ``no_chunks`` | chunks are required, and there are none |
| 429 | ``queue_full`` | the tenant's queue is full; ``Retry-After`` says when to try again |
| 499 | | the client has disconnected |
| 500 | ``store_error``, ``internal_error`` | the service is at fault; its log has the details |
| 503 | ``closing``, ``not_ready`` | the service is shutting down, or not ready (``/ready``) |
| 504 | ``deadline_exceeded`` | the answer took longer than the timeout |
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ragcache.api.ticket_queue import (
    DeadlineExceeded,
    QueueFull,
    RequestCancelled,
    ShuttingDown,
)
from ragcache.errors import ContextError, ModelError, NoChunksError, RagCacheError, StoreError

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_UNION = re.compile(r".*[-\[].*|str|int|float|dict")  # pydantic's names of a union's types
_SHUTTING_DOWN = "the service is shutting down: try again, here or at another replica"


class ApiError(Exception):
    """An error response. ``param`` names the request's field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientDisconnected(Exception):
    """The client has disconnected before it had its answer."""


def as_api_error(error: Exception) -> ApiError:
    """The error response to an exception. That to an internal error gives no details."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            wait = str(math.ceil(error.retry_after_s))
            message = f"{error}: try again in {wait} s"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": wait})
        case ShuttingDown() | RequestCancelled():
            return ApiError(503, _SHUTTING_DOWN, code="closing", headers={"Retry-After": "1"})
        case DeadlineExceeded() | TimeoutError():
            message = "the answer took longer than the timeout: ask for a shorter one, or try later"
            return ApiError(504, message, code="deadline_exceeded")
        case ContextError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case NoChunksError():
            return ApiError(422, str(error), code="no_chunks")
        case StoreError():
            return ApiError(500, str(error), code="store_error")
        case ModelError():  # of vLLM servers that are unreachable, or refuse the request
            return ApiError(502, str(error), code="model_error")
        case RagCacheError():
            return ApiError(400, str(error))
        case _:
            message = "something went wrong in the service: its log has this request's id"
            return ApiError(500, message, code="internal_error")


def add_exception_handlers(app: FastAPI) -> None:
    """Have ``app`` answer every error as an :class:`ApiError`."""
    for kind in (
        ApiError,
        QueueFull,
        ShuttingDown,
        RequestCancelled,
        DeadlineExceeded,
        RagCacheError,
    ):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnected, _disconnected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


async def _answer(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _disconnected(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors(), skip=1).response()


def validation_error(errors: Sequence[Any], skip: int = 0) -> ApiError:
    """The response to pydantic's errors about a request. The first ``skip`` parts of a location,
    such as ``body``, are no part of the field's name."""
    # A union has one error for every type; our own message is clearer than any of these.
    first = next((one for one in errors if one["type"] == "value_error"), errors[0])
    where = [str(part) for part in first["loc"][skip:] if not _UNION.fullmatch(str(part))]
    if (field := getattr(first.get("ctx", {}).get("error"), "field", None)) is not None:
        where.append(field)
    param = ".".join(where) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is unknown"
    if first["type"] == "json_invalid":
        message, param = f"the body is not valid JSON: {first['ctx']['error']}", None
    if first["type"] == "model_attributes_type" and not where:
        message = (
            "the body is not a JSON object: send one, with the header "
            "Content-Type: application/json"
        )
    full = f"{param}: {message}" if param else message
    return ApiError(400, full.encode(errors="replace").decode(), param=param)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    message = error.detail
    if error.status_code in (404, 405) and message == HTTPStatus(error.status_code).phrase:
        path = request.url.path.encode(errors="replace").decode()[:200]
        message = (
            f"there is no route {request.method} {path}: clients of OpenAI's API use "
            "/v1/chat/completions and /v1/models, and /openapi.json lists every route"
        )
    return ApiError(error.status_code, message, code=code, headers=headers).response()
