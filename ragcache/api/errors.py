"""What goes wrong, as OpenAI's error objects: ``{"error": {message, type, param, code}}``.

| status | code | when |
|---|---|---|
| 400 | ``invalid_request``, ``context_length_exceeded`` | a request that cannot be answered |
| 401, 403 | ``invalid_api_key``, ``forbidden_host`` | see security.py |
| 404, 405 | ``not_found``, ``model_not_found``, ``method_not_allowed`` | nothing is there |
| 413 | ``body_too_large`` | the body is longer than the service takes |
| 422 | ``no_chunks`` | there is nothing to answer from, and that was required |
| 429 | ``queue_full`` | the tenant's queue is full; ``Retry-After`` says when to come again |
| 499 | | the client has hung up: nobody reads it |
| 500 | ``store_error``, ``internal_error`` | the service's fault; the log says more |
| 503 | ``closing``, ``not_ready`` | it is shutting down, or see /ready |
| 504 | ``deadline_exceeded`` | the answer took longer than the service gives it |
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ragcache.api.scheduler import Busy, Closing, GivenUp, TooLate
from ragcache.errors import ContextError, ModelError, NoChunksError, RagCacheError, StoreError

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_UNION = re.compile(r".*[-\[].*|str|int|float|dict")  # what pydantic calls a union's types
_CLOSING = "the service is shutting down: ask again, here or another replica"


class Problem(Exception):
    """What a route answers instead of what was asked for. ``param`` names the field at fault."""

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


class ClientGone(Exception):
    """The client has hung up."""


def problem(error: Exception) -> Problem:
    """The answer to an exception. That to an error of our own gives no details away."""
    match error:
        case Problem():
            return error
        case Busy():
            wait = str(math.ceil(error.retry_after_s))
            message = f"{error}: ask again in {wait} s"
            return Problem(429, message, code="queue_full", headers={"Retry-After": wait})
        case Closing() | GivenUp():
            return Problem(503, _CLOSING, code="closing", headers={"Retry-After": "1"})
        case TooLate() | TimeoutError():
            message = "the time that an answer may take is over: ask for a shorter one, or later"
            return Problem(504, message, code="deadline_exceeded")
        case ContextError():
            return Problem(400, str(error), code="context_length_exceeded")
        case NoChunksError():
            return Problem(422, str(error), code="no_chunks")
        case StoreError():
            return Problem(500, str(error), code="store_error")
        case ModelError():  # of servers that run the model: they are gone, or refuse what is asked
            return Problem(502, str(error), code="model_error")
        case RagCacheError():
            return Problem(400, str(error))
        case _:
            message = "something went wrong in the service: its log has this request's id"
            return Problem(500, message, code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a :class:`Problem`."""
    for kind in (Problem, Busy, Closing, GivenUp, TooLate, RagCacheError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


async def _answer(_: Request, error: Exception) -> Response:
    return problem(error).response()


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors(), behind=1).response()


def invalid(errors: Sequence[Any], behind: int = 0) -> Problem:
    """What is wrong with a request, by pydantic's errors. The field's name begins behind so many
    parts of its place, such as ``body``."""
    # Of a union, there is one for every type: what we say ourselves is clearer.
    first = next((one for one in errors if one["type"] == "value_error"), errors[0])
    where = [str(part) for part in first["loc"][behind:] if not _UNION.fullmatch(str(part))]
    if (field := getattr(first.get("ctx", {}).get("error"), "field", None)) is not None:
        where.append(field)
    param = ".".join(where) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is unknown here"
    if first["type"] == "json_invalid":
        message, param = f"the body is no JSON: {first['ctx']['error']}", None
    if first["type"] == "model_attributes_type" and not where:
        message = (
            "the body is no JSON object: send one, with the header Content-Type: application/json"
        )
    said = f"{param}: {message}" if param else message
    return Problem(400, said.encode(errors="replace").decode(), param=param)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return Problem(error.status_code, error.detail, code=code, headers=headers).response()
