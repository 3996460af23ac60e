"""The backend of a running ragcache service, over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from langchain_core.documents import Document

from ragcache.errors import ConfigError, PromptError, RagCacheError
from ragcache.langchain.backend import AnswerMetadata, ChatRequest, SearchRequest
from ragcache.langchain.documents import langchain_metadata
from ragcache.text import replace_surrogates_in

_TIMEOUT_S = 60.0  # for an answer, by default
_MODEL_TIMEOUT_S = 5.0  # for the model's name, which an answer does not need
_RETRY_STATUS = {429, 503}  # the service is busy; Retry-After says for how long
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "response_format")
#: Fields of the ``ragcache`` object.
_OPTIONS = (
    "mode",
    "ratio",
    "misses",
    "instructions",
    "template",
    "documents_in",
    "find_chunks",
    "require_chunks",
)


def _routes(base_url: str) -> str:
    url = base_url.rstrip("/")
    return f"{url}/" if urlsplit(url).path else f"{url}/v1/"


class HttpBackend:
    """A client of the service at ``base_url``, such as ``http://localhost:8000/v1``.

    If the URL has no path, ``/v1`` is added. See :class:`ragcache.langchain.backend.Backend`. If
    the service is busy or unreachable, a request is retried up to ``max_retries`` times, after the
    time in Retry-After or one second. Raises PromptError for a question that the service refuses,
    ConfigError for an API key that it refuses, TimeoutError, and RagCacheError for all other
    failures.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, max_retries: int = 2) -> None:
        self.max_retries = max_retries
        self._ssl = httpx.create_ssl_context()  # slow to create, so all clients share it
        self._options: dict[str, Any] = {
            "base_url": _routes(base_url),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "verify": self._ssl,
            "timeout": _TIMEOUT_S,
        }
        self._client = httpx.Client(**self._options)
        weakref.finalize(self, self._client.close)
        self._model: str | None = None

    def model_name(self) -> str:
        """See :class:`Backend`; requested once, also if the service gives no name."""
        if self._model is None:
            with suppress(httpx.HTTPError):
                self._model = _first_model(self._client.get("models", timeout=_MODEL_TIMEOUT_S))
        return self._model or ""

    async def amodel_name(self) -> str:
        if self._model is None:
            with suppress(httpx.HTTPError):
                async with httpx.AsyncClient(**self._options) as client:
                    self._model = _first_model(await client.get("models", timeout=_MODEL_TIMEOUT_S))
        return self._model or ""

    def token_ids(self, text: str) -> list[int]:
        with self._post(_PostRequest("tokenize", {"text": text})) as response:
            tokens: list[int] = response.json()["tokens"]
            return tokens

    def count(self, request: ChatRequest) -> int:
        with self._post(_PostRequest("tokenize", _prompt(request))) as response:
            return int(response.json()["count"])

    def search(self, request: SearchRequest) -> list[Document]:
        with self._post(_search(request)) as response:
            return _documents(response.json())

    async def asearch(self, request: SearchRequest) -> list[Document]:
        async with self._apost(_search(request)) as response:
            return _documents(json.loads(await response.aread()))

    def ask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]:
        """See :class:`Backend`; the answer comes as one response."""
        with self._post(_chat(request, stream=False)) as response:
            return _parse_completion(response.json())

    async def aask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]:
        async with self._apost(_chat(request, stream=False)) as response:
            return _parse_completion(json.loads(await response.aread()))

    def stream(self, request: ChatRequest) -> Generator[str | AnswerMetadata, None, None]:
        events = _Events()
        with self._post(_chat(request, stream=True)) as response:
            for line in response.iter_lines():
                yield from events.read(line)
        yield events.metadata()

    async def astream(self, request: ChatRequest) -> AsyncGenerator[str | AnswerMetadata, None]:
        events = _Events()
        async with self._apost(_chat(request, stream=True)) as response:
            async for line in response.aiter_lines():
                for piece in events.read(line):
                    yield piece
        yield events.metadata()

    @contextmanager
    def _post(self, post: _PostRequest) -> Iterator[httpx.Response]:
        for left in range(self.max_retries, -1, -1):
            try:
                with (
                    _map_errors(post.timeout),
                    self._client.stream("POST", **post.args) as response,
                ):
                    if response.is_error:
                        response.read()
                    if not (left and response.status_code in _RETRY_STATUS):
                        _check(response)
                        if not post.stream:
                            response.read()
                        yield response
                        return
                    pause = _pause(response)
            except _Unreachable:
                if not left:
                    raise
                pause = 1.0
            time.sleep(pause)

    @asynccontextmanager
    async def _apost(self, post: _PostRequest) -> AsyncIterator[httpx.Response]:
        # An AsyncClient belongs to one event loop, and LangChain uses several: one for each call.
        async with httpx.AsyncClient(**self._options) as client:
            for left in range(self.max_retries, -1, -1):
                try:
                    with _map_errors(post.timeout):
                        async with client.stream("POST", **post.args) as response:
                            if response.is_error:
                                await response.aread()
                            if not (left and response.status_code in _RETRY_STATUS):
                                _check(response)
                                yield response
                                return
                            pause = _pause(response)
                except _Unreachable:
                    if not left:
                        raise
                    pause = 1.0
                await asyncio.sleep(pause)


class _Unreachable(RagCacheError):
    """No service listens at that address."""


class _Events:
    """Parses server-sent events: pieces of text as they come, and the metadata at the end."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._reason = "stop"

    def read(self, line: str) -> Iterator[str]:
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RagCacheError(f"the service ended the answer: {_message(event)}. Try again")
        for name in ("model", "usage", "ragcache"):
            if event.get(name):
                self._last[name] = event[name]
        for choice in event.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            if piece := (choice.get("delta") or {}).get("content"):
                yield piece

    def metadata(self) -> AnswerMetadata:
        return _answer_metadata(self._last, self._reason)


@dataclass(frozen=True, slots=True)
class _PostRequest:
    """A request to one of the service's routes."""

    url: str
    json: dict[str, Any]
    timeout: float = _TIMEOUT_S
    stream: bool = False

    @property
    def args(self) -> dict[str, Any]:
        return {"url": self.url, "json": replace_surrogates_in(self.json), "timeout": self.timeout}


def _first_model(response: httpx.Response) -> str:
    """The first name in a list of models; empty if the response is no such list."""
    try:
        return "" if response.is_error else str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return ""


def _search(request: SearchRequest) -> _PostRequest:
    given = {name: value for name, value in request.options.items() if value is not None}
    return _PostRequest("search", {"question": request.question, **given})


def _documents(body: Mapping[str, Any]) -> list[Document]:
    """Passages as documents, with ids as :func:`ragcache.langchain.documents.as_document` makes
    them."""
    return [
        Document(
            found["text"],
            id=found["document"] if found["chunks"] == 1 else found["id"],
            metadata=langchain_metadata(found["metadata"]),
        )
        for found in body["data"]
    ]


def _prompt(request: ChatRequest) -> dict[str, Any]:
    """The fields of a request that determine the prompt, and the other options of fusion."""
    body: dict[str, Any] = {
        "messages": list(request.messages),
        "documents": [
            {"text": one.text} if one.id is None else {"id": one.id, "text": one.text}
            for one in request.documents
        ],
    }
    if options := _given(request, _OPTIONS):
        body["ragcache"] = options
    return body


def _chat(request: ChatRequest, *, stream: bool) -> _PostRequest:
    body = {"model": request.model or "ragcache", **_prompt(request), "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    body |= _given(request, _SAMPLING)
    if request.stop:
        body["stop"] = list(request.stop)
    timeout = _TIMEOUT_S if request.timeout is None else request.timeout
    return _PostRequest("chat/completions", body, timeout, stream)


def _given(request: ChatRequest, names: Iterable[str]) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name in names if (value := getattr(request, name)) is not None}


@contextmanager
def _map_errors(seconds: float = _TIMEOUT_S) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimeoutError(f"the service gave no answer within {seconds} seconds") from error
    except httpx.ConnectError as error:
        raise _Unreachable(
            f"no service answers at {error.request.url}: {error}. Start one, or check base_url."
        ) from error
    except httpx.HTTPError as error:
        raise RagCacheError(
            f"the request to the service failed: {error}. Check base_url"
        ) from error


def _check(response: httpx.Response) -> None:
    """Raise the exception for an error response, whose body has been read."""
    if not response.is_error:
        return
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text[:200]
    full = f"the service answered {response.status_code}: {message}"
    if response.status_code in {401, 403}:
        raise ConfigError(f"{full}. Check api_key.")
    if response.status_code in {400, 413, 422}:
        raise PromptError(full)
    raise RagCacheError(full)


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


def _pause(response: httpx.Response) -> float:
    after = response.headers.get("Retry-After", "")
    return min(float(after), _TIMEOUT_S) if after.isdecimal() else 1.0


def _parse_completion(body: dict[str, Any]) -> tuple[str, AnswerMetadata]:
    (choice,) = body["choices"]
    return choice["message"]["content"] or "", _answer_metadata(body, choice.get("finish_reason"))


def _answer_metadata(body: Mapping[str, Any], reason: str | None) -> AnswerMetadata:
    usage = body.get("usage") or {}
    return AnswerMetadata(
        model=body.get("model") or "ragcache",
        finish_reason="length" if reason == "length" else "stop",
        input_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
        report=dict(body.get("ragcache") or {}),
    )
