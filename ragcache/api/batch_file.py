"""Offline answers to a file of requests: ``ragcache batch``.

A line is a request of OpenAI's batch API, which vLLM's ``run-batch`` also reads, ``{"custom_id",
"method": "POST", "url", "body"}``, with ``url`` /v1/chat/completions or /v1/query; or the body of
/v1/query alone, which may have a ``custom_id``. A result is ``{"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}``, and results are in the order of the requests.

Requests are answered in an order that reuses loaded chunks (see :mod:`ragcache.batch.order`). Each
result is appended to ``OUT.part`` with its line's number and digest, and a run with the same file
continues from there. ``OUT`` is written at the end, in one piece.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from xxhash import xxh3_128_hexdigest

from ragcache.api.chat_request import chat_request, query_request
from ragcache.api.errors import ApiError, as_api_error, validation_error
from ragcache.api.requests import Chat, Query
from ragcache.api.responses import ChatCompletionResponse, QueryResponse
from ragcache.batch.order import order_by_chunks
from ragcache.core.request import Request
from ragcache.errors import RagCacheError, SourceError
from ragcache.models.trusted_names import absolute_name
from ragcache.text import replace_surrogates_in
from ragcache.types import Chunk, Passage
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from ragcache.rag import RagCache

__all__ = ["iter_answer_batch", "read_batch"]

_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line of the file. ``body`` is the error of a line that is no valid request."""

    number: int  # of the line, from 1
    digest: str  # of the line
    custom_id: str
    body: Query | Chat | ApiError

    @classmethod
    def parse(cls, number: int, line: bytes) -> BatchLine:
        digest, name = xxh3_128_hexdigest(line), f"request-{number}"
        try:
            fields = replace_surrogates_in(json.loads(line))
            if not isinstance(fields, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            wrong = ApiError(
                400, f"line {number} is not valid JSON: {error}. Write one request per line."
            )
            return cls(number, digest, name, wrong)
        name = str(fields.get("custom_id") or name)
        return cls(number, digest, name, _parse_body(fields))


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """The outcome of a run."""

    requests: int
    answered: int  # by this run
    resumed: int
    failed: int  # of all requests: their results have an error
    without: int  # of all requests: answered without any chunks


def read_batch(path: Path) -> list[BatchLine]:
    """The requests of a file. Raises SourceError if it cannot be read, or two have the same id."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(
            f"cannot read the questions in {path}: {error.strerror}. Name a file that this user "
            "may read."
        ) from error
    parsed = [BatchLine.parse(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    seen: dict[str, int] = {}
    for line in parsed:
        if (first := seen.setdefault(line.custom_id, line.number)) != line.number:
            raise SourceError(
                f"{path}: lines {first} and {line.number} have the same custom_id, "
                f"{line.custom_id!r}: give each its own"
            )
    return parsed


def iter_answer_batch(
    cache: RagCache, lines: list[BatchLine], out: Path, *, reorder: bool = True
) -> Generator[tuple[str, int, int], None, BatchSummary]:
    """Answer the requests that have no result yet, in steps, and write ``out``.

    Yields (step, done, total). Without ``reorder``, requests are answered in the order of the file.
    An error of a request is its result; an error of the store, or an internal one, is raised, and
    the results so far are kept.
    """
    part = out.with_name(f"{out.name}.part")
    results = _read_results(part, lines)
    resumed = len(results)
    left = [line for line in lines if line.number not in results]
    requests = dict[int, Request]()
    with open_private(part, "ab") as file:

        def save(line: BatchLine, result: dict[str, Any]) -> None:
            results[line.number] = result
            row = [line.number, line.digest, result]
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        for at, line in enumerate(left):
            yield "retrieve", at, len(left)
            try:
                requests[line.number] = _retrieve(cache, line)
            except (ApiError, RagCacheError) as error:
                save(line, _result(line, _request_error(error)))
        yield "retrieve", len(left), len(left)
        todo = [line for line in left if line.number in requests]
        for done, at in enumerate(_order(cache, [requests[one.number] for one in todo], reorder)):
            yield "answer", done, len(todo)
            line = todo[at]
            save(line, _answer(cache, line, requests.pop(line.number)))
        yield "answer", len(todo), len(todo)
        os.fsync(file.fileno())
    _write(out, [results[line.number] for line in lines])
    part.unlink()
    failed = sum(result["error"] is not None for result in results.values())
    without = sum(_has_no_chunks(result) for result in results.values())
    return BatchSummary(len(lines), len(left), resumed, failed, without)


def _parse_body(fields: dict[str, Any]) -> Query | Chat | ApiError:
    """The request's body, or its error."""
    body, url = fields.get("body"), fields.get("url", "/v1/query")
    if "body" not in fields:
        body = {key: value for key, value in fields.items() if key != "custom_id"}
    elif unknown := fields.keys() - _FIELDS:
        return ApiError(400, f"{', '.join(sorted(unknown))}: unknown field: leave it out")
    models: dict[str, type[Query] | type[Chat]] = {
        "/v1/query": Query,
        "/v1/chat/completions": Chat,
    }
    if fields.get("method", "POST") != "POST" or url not in models:
        return ApiError(400, f"url is {url!r}: POST to {' or '.join(models)}", param="url")
    try:
        parsed = models[url].model_validate(body)
    except ValidationError as error:
        return validation_error(error.errors())
    if parsed.stream:
        return ApiError(400, "stream: a batch has no streams: leave it out", param="stream")
    return parsed


def _retrieve(cache: RagCache, line: BatchLine) -> Request:
    """The line's request with its chunks. Raises ApiError and RagCacheError."""
    body, default = line.body, cache.default_sampling
    if isinstance(body, ApiError):
        raise body
    if isinstance(body, Query):
        request = query_request(body, default)
    else:
        names = {cache.engine.name, "ragcache", cache.catalog.get_setting("model")}
        if not {body.model, absolute_name(body.model)} & names:
            raise ApiError(
                404,
                f"there is no model {body.model!r} here: use {cache.engine.name!r}",
                code="model_not_found",
                param="model",
            )
        request = chat_request(body, default, trusts_templates=True)
    return cache.with_retrieved(request)


def _order(cache: RagCache, requests: list[Request], reorder: bool) -> list[int]:
    if not reorder:
        return list(range(len(requests)))
    sizes = dict[str, int]()
    used = [[_text(chunk) for chunk in request.chunks or ()] for request in requests]
    for text in {text for texts in used for text in texts}:
        tokens = len(cache.template.chunk(text)) if text.strip() else 0
        sizes[text] = cache.engine.spec.chunk_bytes(tokens)
    return order_by_chunks(used, sizes, int(cache.settings.ram_bytes))


def _text(chunk: str | Chunk | Passage) -> str:
    if isinstance(chunk, str):
        return chunk
    return chunk.chunk.text if isinstance(chunk, Passage) else chunk.text


def _answer(cache: RagCache, line: BatchLine, request: Request) -> dict[str, Any]:
    response_type = ChatCompletionResponse if isinstance(line.body, Chat) else QueryResponse
    trace = line.body.ragcache.trace if isinstance(line.body, Chat) else False
    if isinstance(line.body, Query):
        trace = line.body.trace
    try:
        answer = cache.generate(request).answer
    except RagCacheError as error:
        return _result(line, _request_error(error))
    return _result(line, response_type(cache.engine, _id(line), trace).body(answer))


def _has_no_chunks(result: dict[str, Any]) -> bool:
    return bool(result["response"]["body"].get("ragcache", {}).get("no_chunks"))


def _request_error(error: ApiError | RagCacheError) -> ApiError:
    """The error of a request. Raises ``error`` if the request is not at fault, since every other
    request would then fail too."""
    api_error = as_api_error(error)
    if api_error.status >= 500:
        raise error
    return api_error


def _id(line: BatchLine) -> str:
    return f"{line.number}-{line.digest[:12]}"


def _result(line: BatchLine, outcome: dict[str, Any] | ApiError) -> dict[str, Any]:
    failed = isinstance(outcome, ApiError)
    body = outcome.body() if isinstance(outcome, ApiError) else outcome
    return {
        "id": f"batch-{_id(line)}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": outcome.status if isinstance(outcome, ApiError) else 200,
            "request_id": _id(line),
            "body": body,
        },
        "error": {k: body["error"][k] for k in ("code", "message")} if failed else None,
    }


def _read_results(part: Path, lines: list[BatchLine]) -> dict[int, dict[str, Any]]:
    """The results of an earlier run for the same lines. An incomplete last row is cut off."""
    if not part.exists():
        return {}
    wanted = {(line.number, line.digest) for line in lines}
    results, complete = dict[int, dict[str, Any]](), 0
    with part.open("rb") as rows:
        for row in rows:
            try:
                number, digest, result = json.loads(row)
            except ValueError:
                break
            if not row.endswith(b"\n"):
                break
            complete += len(row)
            if (number, digest) in wanted:
                results[number] = result
    os.truncate(part, complete)
    return results


def _write(out: Path, results: list[dict[str, Any]]) -> None:
    """Replace ``out`` by a file of all results, atomically."""
    new = out.with_name(f"{out.name}.new")
    with open_private(new, "wb") as file:
        file.writelines(_lines(results))
        file.flush()
        os.fsync(file.fileno())
    new.replace(out)


def _lines(results: list[dict[str, Any]]) -> Iterator[bytes]:
    return (json.dumps(result).encode() + b"\n" for result in results)
