"""``/v1/query`` and ``/v1/chat/completions`` answer questions, streamed or as one object;
``/v1/search`` returns the chunks alone, and ``/v1/tokenize`` counts tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from ragcache.api.bridge import AnswerStream, cancel_on_disconnect, wait_for_future
from ragcache.api.chat_request import chat_request, counted_request, query_request
from ragcache.api.errors import ApiError
from ragcache.api.requests import Chat, Query, QueryOrChat, Search, Tokenize
from ragcache.api.responses import ChatCompletionResponse, QueryResponse
from ragcache.api.routes import (
    AppState,
    StateDep,
    TenantDep,
    log_answer,
    log_stream_error,
    open_cache,
    run_in_thread,
)
from ragcache.api.serialize import explanation_json, passage_json
from ragcache.api.sse import EventStream
from ragcache.api.token_counts import check_text_length, count_prompt
from ragcache.core.request import Request, request_texts
from ragcache.rag import RagCache

router = APIRouter(tags=["answers"])


@router.post("/v1/query", response_model=None)
async def query(
    body: Query, http_request: HttpRequest, state: StateDep, tenant: TenantDep
) -> dict[str, Any] | Response:
    """Retrieve chunks, fuse their KV and answer. A stream sends pieces of text as ``delta``, then
    the complete answer object."""
    request = query_request(body, state.sampling)
    engine = state.service.default_cache.engine
    response = QueryResponse(engine, http_request.state.request_id, body.trace)
    return await _answer(state, http_request, tenant, request, response, bool(body.stream))


@router.post("/v1/explain")
async def explain(
    body: QueryOrChat, http_request: HttpRequest, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """What would be loaded for a body of ``/v1/query`` or of chat completions, part by part, and
    why the rest would not. Nothing is answered."""
    if isinstance(body, Query):
        request = query_request(body, state.sampling)
    else:
        request = _chat_request(body, state)
    service = state.service
    future = service.call(
        tenant, lambda cache: cache.explain(request), seconds=service.settings.timeout_s
    )
    found = explanation_json(await wait_for_future(http_request.receive, future))
    return {"object": "ragcache.explanation", "model": state.model, **found}


@router.post("/v1/search")
async def search(
    body: Search, http_request: HttpRequest, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """The chunks that ``/v1/query`` would answer from, in prompt order."""
    service = state.service
    future = service.search(
        tenant, body.question, seconds=service.settings.timeout_s, **body.retrieving
    )
    data = []
    for passage, chunks in await wait_for_future(http_request.receive, future):
        data.append({"object": "ragcache.passage", **passage_json(passage), "chunks": chunks})
    cache = await open_cache(state, tenant)
    asked = body.retrieving
    no_chunks = None if data else await run_in_thread(lambda: cache.no_chunks(asked))
    return {"object": "list", "data": data, "no_chunks": no_chunks}


@router.post("/v1/tokenize")
async def tokenize(
    body: Tokenize, http_request: HttpRequest, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """The tokens of a text; or the token counts of the prompt that a question or messages make with
    their documents. Nothing is retrieved or answered."""
    service, engine = state.service, state.service.default_cache.engine
    trusted = service.settings.trust_request_templates
    request = counted_request(body, trusts_templates=trusted)
    check_text_length(engine, [body.text or "", *request_texts(request)])

    def count(cache: RagCache) -> dict[str, Any]:
        if body.text is not None:
            tokens = cache.engine.tokenize(body.text)
            return {"count": len(tokens), "tokens": list(tokens)}
        counts = count_prompt(cache, request)
        return {"count": counts.count, **asdict(counts)}

    future = service.call(tenant, count, seconds=service.settings.timeout_s)
    counts = await wait_for_future(http_request.receive, future)
    return {"object": "ragcache.tokens", "context_tokens": engine.context_tokens, **counts}


@router.post("/v1/chat/completions", response_model=None)
async def completions(
    body: Chat, http_request: HttpRequest, state: StateDep, tenant: TenantDep
) -> dict[str, Any] | Response:
    """OpenAI's chat completions, with ``documents``: docs/serving.md says what becomes a chunk."""
    request = _chat_request(body, state)
    options = body.stream_options
    response = ChatCompletionResponse(
        state.service.default_cache.engine,
        http_request.state.request_id,
        body.ragcache.trace,
        include_usage=options is not None and bool(options.include_usage),
    )
    return await _answer(state, http_request, tenant, request, response, bool(body.stream))


def _chat_request(body: Chat, state: AppState) -> Request:
    """The request of a chat. Raises ApiError for another model, and as :func:`chat_request`."""
    if body.model not in (state.model, "ragcache"):
        raise ApiError(
            404,
            f"there is no model {body.model!r} here: ask for {state.model!r}, or 'ragcache'",
            code="model_not_found",
            param="model",
        )
    trusted = state.service.settings.trust_request_templates
    return chat_request(body, state.sampling, trusts_templates=trusted)


async def _answer(
    state: AppState,
    http_request: HttpRequest,
    tenant: str,
    request: Request,
    response: QueryResponse,
    streamed: bool,
) -> dict[str, Any] | Response:
    """Answer a request as ``response`` shapes it. If the client disconnects, the request is
    cancelled, streamed or not."""
    stream = AnswerStream(state.service, tenant, request, state.service.settings.timeout_s)
    if not streamed:
        try:
            answer = await cancel_on_disconnect(http_request.receive, stream.collect())
            return response.body(answer)
        finally:
            log_answer(state, http_request, stream, request.asked)

    def on_end(error: Exception | None) -> None:
        stream.cancel()
        log_stream_error(http_request, error)
        log_answer(state, http_request, stream, request.asked)

    try:
        await cancel_on_disconnect(http_request.receive, stream.started())
    except BaseException:
        log_answer(state, http_request, stream, request.asked)
        raise
    return EventStream(response.events(stream), on_end)
