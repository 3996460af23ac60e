"""Questions from a file, answered offline: ``ragcache batch``.

A line is a request as OpenAI's batch files and vLLM's ``run-batch`` have it, ``{"custom_id",
"method": "POST", "url", "body"}``, with ``url`` /v1/chat/completions or /v1/query; or the body of
/v1/query alone, with a ``custom_id`` if it likes. A result is ``{"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}``, and results are in the order of the requests.

Requests are answered in another order (see :mod:`ragcache.batch.order`). Each result is kept in
``OUT.part`` as it is made, under its line's number and digest; whoever runs the same again goes on
from there. ``OUT`` is written at the end, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from xxhash import xxh3_128_hexdigest

from ragcache.api import chat_request
from ragcache.api.errors import Problem, invalid, problem
from ragcache.api.requests import Chat, Query
from ragcache.api.responses import CompletionShape, QueryShape
from ragcache.batch.order import order_by_chunks
from ragcache.blend import blender
from ragcache.core.request import Request
from ragcache.errors import RagCacheError, SourceError
from ragcache.models.trusted_names import absolute_name
from ragcache.text import replace_surrogates_in
from ragcache.types import Chunk, Passage
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from ragcache.rag import RagCache

_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line of the file, which may be none that can be answered."""

    number: int  # of the line, from 1
    digest: str  # of the line
    custom_id: str
    asked: Query | Chat | Problem

    @classmethod
    def parse(cls, number: int, line: bytes) -> BatchLine:
        digest, name = xxh3_128_hexdigest(line), f"request-{number}"
        try:
            given = replace_surrogates_in(json.loads(line))
            if not isinstance(given, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            wrong = Problem(400, f"line {number} is no JSON: {error}. Give one request a line.")
            return cls(number, digest, name, wrong)
        name = str(given.get("custom_id") or name)
        return cls(number, digest, name, _asked(given))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did."""

    requests: int
    answered: int  # by this run
    resumed: int
    failed: int  # of all: their results have an error
    without: int  # of all: answered, and no chunks to answer from


def read(path: Path) -> list[BatchLine]:
    """All requests of a file. Raises SourceError where it cannot be read, or two have one id."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(
            f"cannot read the questions in {path}: {error.strerror}. Name a file that this user "
            "may read."
        ) from error
    requests = [BatchLine.parse(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    seen: dict[str, int] = {}
    for request in requests:
        if (first := seen.setdefault(request.custom_id, request.number)) != request.number:
            raise SourceError(
                f"{path}: lines {first} and {request.number} have one custom_id, "
                f"{request.custom_id!r}: give each its own"
            )
    return requests


def answering(
    cache: RagCache, requests: list[BatchLine], out: Path, *, reorder: bool = True
) -> Generator[tuple[str, int, int], None, Summary]:
    """Answer what is not answered yet, in steps, and write ``out``.

    Without ``reorder``, in the order of the file. What is wrong with a request is its result; what
    is wrong with the store, or with us, raises, and what was answered is kept.
    """
    part = out.with_name(f"{out.name}.part")
    results = _kept(part, requests)
    resumed = len(results)
    left = [request for request in requests if request.number not in results]
    asks = dict[int, Request]()
    with open_private(part, "ab") as kept:

        def keep(request: BatchLine, result: dict[str, Any]) -> None:
            results[request.number] = result
            row = [request.number, request.digest, result]
            kept.write(json.dumps(row).encode() + b"\n")
            kept.flush()

        for at, request in enumerate(left):
            yield "retrieve", at, len(left)
            try:
                asks[request.number] = _found(cache, request)
            except (Problem, RagCacheError) as error:
                keep(request, _result(request, _its_own(error)))
        yield "retrieve", len(left), len(left)
        todo = [request for request in left if request.number in asks]
        for done, number in enumerate(_order(cache, [asks[r.number] for r in todo], reorder)):
            yield "answer", done, len(todo)
            request = todo[number]
            keep(request, _answered(cache, request, asks.pop(request.number)))
        yield "answer", len(todo), len(todo)
        os.fsync(kept.fileno())
    _write(out, [results[request.number] for request in requests])
    part.unlink()
    failed = sum(result["error"] is not None for result in results.values())
    without = sum(_without(result) for result in results.values())
    return Summary(len(requests), len(left), resumed, failed, without)


def _asked(given: dict[str, Any]) -> Query | Chat | Problem:
    """What a line asks, or what is wrong with it."""
    body, url = given.get("body"), given.get("url", "/v1/query")
    if "body" not in given:
        body = {key: value for key, value in given.items() if key != "custom_id"}
    elif unknown := given.keys() - _KEYS:
        return Problem(400, f"{', '.join(sorted(unknown))}: no field of a request: leave it out")
    kinds: dict[str, type[Query] | type[Chat]] = {
        "/v1/query": Query,
        "/v1/chat/completions": Chat,
    }
    if given.get("method", "POST") != "POST" or url not in kinds:
        return Problem(400, f"url is {url!r}: POST to {' or '.join(kinds)}", param="url")
    try:
        asked = kinds[url].model_validate(body)
    except ValidationError as error:
        return invalid(error.errors())
    if asked.stream:
        return Problem(400, "stream: a batch has no streams: leave it out", param="stream")
    return asked


def _found(cache: RagCache, request: BatchLine) -> Request:
    """The question with its chunks. Raises Problem and RagCacheError."""
    asked, default = request.asked, cache.default_sampling
    if isinstance(asked, Problem):
        raise asked
    if isinstance(asked, Query):
        ask = chat_request.ask_query(asked, default)
    else:
        names = {cache.engine.name, "ragcache", cache.catalog.get_setting("model")}
        if not {asked.model, absolute_name(asked.model)} & names:
            raise Problem(
                404,
                f"there is no model {asked.model!r} here: name {cache.engine.name!r}",
                code="model_not_found",
                param="model",
            )
        ask = chat_request.ask(asked, default)
    if ask.chunks is None:
        cache.check_usable(blender(cache.settings.mode if ask.mode is None else ask.mode))
        found = cache.retrieve(ask.question, ask.top_k, ask.neighbours)
        ask = replace(ask, chunks=found or None)  # where it is none, the answer says why
    return ask


def _order(cache: RagCache, asks: list[Request], reorder: bool) -> list[int]:
    if not reorder:
        return list(range(len(asks)))
    sizes = dict[str, int]()
    used = [[_text(chunk) for chunk in ask.chunks or ()] for ask in asks]
    for text in {text for texts in used for text in texts}:
        tokens = len(cache.template.chunk(text)) if text.strip() else 0
        sizes[text] = cache.engine.spec.chunk_bytes(tokens)
    return order_by_chunks(used, sizes, int(cache.settings.ram_bytes))


def _text(chunk: str | Chunk | Passage) -> str:
    if isinstance(chunk, str):
        return chunk
    return chunk.chunk.text if isinstance(chunk, Passage) else chunk.text


def _answered(cache: RagCache, request: BatchLine, ask: Request) -> dict[str, Any]:
    shape = CompletionShape if isinstance(request.asked, Chat) else QueryShape
    trace = request.asked.ragcache.trace if isinstance(request.asked, Chat) else False
    if isinstance(request.asked, Query):
        trace = request.asked.trace
    try:
        answer = cache.generate(ask).answer
    except RagCacheError as error:
        return _result(request, _its_own(error))
    body = shape(cache.engine, _id(request), trace).whole(answer)
    return _result(request, body)


def _without(result: dict[str, Any]) -> bool:
    """Whether an answer was made from no chunks."""
    return bool(result["response"]["body"].get("ragcache", {}).get("no_chunks"))


def _its_own(error: Problem | RagCacheError) -> Problem:
    """What is wrong with a request. Raises what is not its fault: the next would fare no better."""
    found = problem(error)
    if found.status >= 500:
        raise error
    return found


def _id(request: BatchLine) -> str:
    return f"{request.number}-{request.digest[:12]}"


def _result(request: BatchLine, found: dict[str, Any] | Problem) -> dict[str, Any]:
    wrong = isinstance(found, Problem)
    body = found.body() if isinstance(found, Problem) else found
    return {
        "id": f"batch-{_id(request)}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": found.status if isinstance(found, Problem) else 200,
            "request_id": _id(request),
            "body": body,
        },
        "error": {k: body["error"][k] for k in ("code", "message")} if wrong else None,
    }


def _kept(part: Path, requests: list[BatchLine]) -> dict[int, dict[str, Any]]:
    """Results of an earlier run for the very same lines. What was being written when it ended is
    cut off."""
    if not part.exists():
        return {}
    wanted = {(request.number, request.digest) for request in requests}
    results, whole = dict[int, dict[str, Any]](), 0
    with part.open("rb") as lines:
        for line in lines:
            try:
                number, digest, result = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if (number, digest) in wanted:
                results[number] = result
    os.truncate(part, whole)
    return results


def _write(out: Path, results: list[dict[str, Any]]) -> None:
    """All results, in the place of what was there, in one go."""
    new = out.with_name(f"{out.name}.new")
    with open_private(new, "wb") as file:
        file.writelines(_lines(results))
        file.flush()
        os.fsync(file.fileno())
    new.replace(out)


def _lines(results: list[dict[str, Any]]) -> Iterator[bytes]:
    return (json.dumps(result).encode() + b"\n" for result in results)
