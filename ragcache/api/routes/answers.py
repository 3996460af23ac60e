"""``/v1/query`` and ``/v1/chat/completions``: questions and their answers, streamed or whole; and
``/v1/search``: the chunks alone."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from ragcache.api import chat
from ragcache.api.asking import Asked, awaited, unless_gone
from ragcache.api.problems import Problem
from ragcache.api.reporting import passage_json, report_json
from ragcache.api.routes import Served, State, Tenant, account, failed, finish_reason, usage
from ragcache.api.schemas import Chat, Query, Search
from ragcache.api.service import Ask
from ragcache.api.sse import EventStream
from ragcache.types import Answer

router = APIRouter(tags=["answers"])


@router.post("/v1/query", response_model=None)
async def query(
    given: Query, request: Request, state: Served, tenant: Tenant
) -> dict[str, Any] | Response:
    """Retrieve, fuse, answer. Streamed, pieces come as ``delta``, and the whole answer last."""
    ask = Ask(
        given.question,
        mode=given.mode,
        ratio=given.ratio,
        top_k=given.top_k,
        neighbours=given.neighbours,
        sampling=given.sampling(state.sampling),
    )
    shape = _Query(state, request, given.trace)
    return await _answered(state, request, tenant, ask, shape, bool(given.stream))


@router.post("/v1/search")
async def search(given: Search, request: Request, state: Served, tenant: Tenant) -> dict[str, Any]:
    """The chunks that ``/v1/query`` would answer from, in the order of its prompt."""
    service = state.service
    work = service.search(
        tenant,
        given.question,
        top_k=given.top_k,
        neighbours=given.neighbours,
        seconds=service.settings.timeout_s,
    )
    data = []
    for passage, chunks in await awaited(request.receive, work):
        data.append({"object": "ragcache.passage", **passage_json(passage), "chunks": chunks})
    return {"object": "list", "data": data}


@router.post("/v1/chat/completions", response_model=None)
async def completions(
    given: Chat, request: Request, state: Served, tenant: Tenant
) -> dict[str, Any] | Response:
    """OpenAI's chat completions, with ``documents``: see docs/serving.md for what is a chunk."""
    if given.model not in (state.model, "ragcache"):
        raise Problem(
            404,
            f"there is no model {given.model!r} here: ask for {state.model!r}, or 'ragcache'",
            code="model_not_found",
            param="model",
        )
    ask = chat.ask(given, state.sampling)
    wants = given.stream_options is not None and bool(given.stream_options.include_usage)
    shape = _Completion(state, request, given.ragcache.trace, include_usage=wants)
    return await _answered(state, request, tenant, ask, shape, bool(given.stream))


async def _answered(
    state: State, request: Request, tenant: str, ask: Ask, shape: _Query, stream: bool
) -> dict[str, Any] | Response:
    """In the shape that is asked for. A client that hangs up ends the work, streamed or not."""
    asked = Asked(state.service, tenant, ask, state.service.settings.timeout_s)
    if not stream:
        try:
            return shape.whole(await unless_gone(request.receive, asked.whole()))
        finally:
            account(state, request, asked, ask.question)

    def ended(error: Exception | None) -> None:
        asked.give_up()
        failed(request, error)
        account(state, request, asked, ask.question)

    try:
        await unless_gone(request.receive, asked.begun())
    except BaseException:
        account(state, request, asked, ask.question)
        raise
    return EventStream(shape.events(asked), ended)


class _Query:
    """The answers of ``/v1/query``."""

    kind = "query"

    def __init__(self, state: State, request: Request, trace: bool) -> None:
        self.engine, self.trace = state.service.own.engine, trace
        self.common = {
            "id": f"{self.kind}-{request.state.request_id}",
            "created": int(time.time()),
            "model": state.model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        return {
            **self.common,
            "object": "ragcache.answer",
            "answer": answer.text,
            "finish_reason": finish_reason(answer),
            "passages": [passage_json(passage) for passage in answer.passages],
            "usage": usage(answer),
            "ragcache": self.report(answer),
        }

    def report(self, answer: Answer) -> dict[str, Any]:
        return report_json(answer, self.engine, trace=self.trace)

    async def events(self, asked: Asked) -> AsyncGenerator[dict[str, Any]]:
        async with aclosing(asked.pieces()) as pieces:
            async for piece in pieces:
                yield {"delta": piece}
        assert asked.answer is not None
        yield self.whole(asked.answer)


class _Completion(_Query):
    """The answers of ``/v1/chat/completions``."""

    kind = "chatcmpl"

    def __init__(self, state: State, request: Request, trace: bool, *, include_usage: bool) -> None:
        super().__init__(state, request, trace)
        self.include_usage = include_usage
        self.common["system_fingerprint"] = self.engine.fingerprint.digest.hex()[:16]

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason(answer),
        }
        return {
            **self.common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "ragcache": self.report(answer),
        }

    async def events(self, asked: Asked) -> AsyncGenerator[dict[str, Any]]:
        yield self._chunk({"role": "assistant", "content": "", "refusal": None})
        async with aclosing(asked.pieces()) as pieces:
            async for piece in pieces:
                yield self._chunk({"content": piece})
        answer = asked.answer
        assert answer is not None
        yield self._chunk({}, finish_reason(answer)) | {"ragcache": self.report(answer)}
        if self.include_usage:
            yield self._chunk(None) | {"usage": usage(answer)}

    def _chunk(self, delta: dict[str, Any] | None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        event = {
            **self.common,
            "object": "chat.completion.chunk",
            "choices": [] if delta is None else [choice],
        }
        return event | ({"usage": None} if self.include_usage else {})
