"""``/v1/query`` and ``/v1/chat/completions``: questions and their answers, streamed or whole; and
``/v1/search`` and ``/v1/tokenize``: the chunks alone, and the tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from ragcache.api import chat_request
from ragcache.api.bridge import Asked, awaited, unless_gone
from ragcache.api.counting import check_countable, prompt_counts
from ragcache.api.errors import Problem
from ragcache.api.requests import Chat, Query, Search, Tokenize
from ragcache.api.responses import CompletionShape, QueryShape
from ragcache.api.routes import Served, State, Tenant, account, failed, in_thread, opened
from ragcache.api.serialize import passage_json
from ragcache.api.sse import EventStream
from ragcache.core.request import Request
from ragcache.rag import RagCache

router = APIRouter(tags=["answers"])


@router.post("/v1/query", response_model=None)
async def query(
    given: Query, request: HttpRequest, state: Served, tenant: Tenant
) -> dict[str, Any] | Response:
    """Retrieve, fuse, answer. Streamed, pieces come as ``delta``, and the whole answer last."""
    ask = chat_request.ask_query(given, state.sampling)
    shape = QueryShape(state.service.own.engine, request.state.request_id, given.trace)
    return await _answered(state, request, tenant, ask, shape, bool(given.stream))


@router.post("/v1/search")
async def search(
    given: Search, request: HttpRequest, state: Served, tenant: Tenant
) -> dict[str, Any]:
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
    cache = await opened(state, tenant)
    why = None if data else await in_thread(cache.no_chunks)
    return {"object": "list", "data": data, "no_chunks": why}


@router.post("/v1/tokenize")
async def tokenize(
    given: Tokenize, request: HttpRequest, state: Served, tenant: Tenant
) -> dict[str, Any]:
    """The model's own tokens of a text; or how many the prompt of a question has, over the
    documents that come with it. Nothing is looked for or answered."""
    service, engine = state.service, state.service.own.engine
    documents = [
        chat_request.document(one, at).text for at, one in enumerate(given.documents or ())
    ]
    said = given.question or "" if given.text is None else given.text
    check_countable(engine, [said, *documents])

    def counted(cache: RagCache) -> dict[str, Any]:
        if given.text is not None:
            tokens = cache.engine.tokenize(given.text)
            return {"count": len(tokens), "tokens": list(tokens)}
        counts = prompt_counts(cache.template, said, documents)
        return {"count": counts.count, **asdict(counts)}

    work = service.turn(tenant, counted, seconds=service.settings.timeout_s)
    found = await awaited(request.receive, work)
    return {"object": "ragcache.tokens", "context_tokens": engine.context_tokens, **found}


@router.post("/v1/chat/completions", response_model=None)
async def completions(
    given: Chat, request: HttpRequest, state: Served, tenant: Tenant
) -> dict[str, Any] | Response:
    """OpenAI's chat completions, with ``documents``: see docs/serving.md for what is a chunk."""
    if given.model not in (state.model, "ragcache"):
        raise Problem(
            404,
            f"there is no model {given.model!r} here: ask for {state.model!r}, or 'ragcache'",
            code="model_not_found",
            param="model",
        )
    ask = chat_request.ask(given, state.sampling)
    wants = given.stream_options is not None and bool(given.stream_options.include_usage)
    shape = CompletionShape(
        state.service.own.engine,
        request.state.request_id,
        given.ragcache.trace,
        include_usage=wants,
    )
    return await _answered(state, request, tenant, ask, shape, bool(given.stream))


async def _answered(
    state: State, request: HttpRequest, tenant: str, ask: Request, shape: QueryShape, stream: bool
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
