"""A running ragcache service, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from langchain_core.documents import Document

from ragcache.errors import ConfigError, PromptError, RagCacheError
from ragcache.langchain.backend import ChatRequest, Finished
from ragcache.langchain.chunk_parsing import Given, KnownTexts
from ragcache.langchain.documents import metadata
from ragcache.text import replace_surrogates_in

_WAIT_S = 60.0  # for an answer, where no timeout is given
_BRIEFLY_S = 5.0  # for the model's name, which an answer can do without
_KNOWN_S = 30.0  # for which a list of known chunks is taken for up to date
_PAGE = 1000  # texts asked for at a time
_AGAIN = {429, 503}  # busy: the service says when to come again
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def _routes(base_url: str) -> str:
    url = base_url.rstrip("/")
    return f"{url}/" if urlsplit(url).path else f"{url}/v1/"


class Service:
    """A client of the service at ``base_url``, such as ``http://localhost:8000/v1``.

    Where that has no path, ``/v1`` is added.

    See :class:`ragcache.langchain.backend.Backend`. A service that is busy, or that cannot be
    reached, is asked ``max_retries`` times more, when it says so or after a second. Raises
    PromptError for a question that it refuses, ConfigError for a key that it does, TimeoutError,
    and RagCacheError for whatever else keeps it from answering.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, max_retries: int = 2) -> None:
        self.max_retries = max_retries
        self._ssl = httpx.create_ssl_context()  # slow to make, so that clients share it
        self._options: dict[str, Any] = {
            "base_url": _routes(base_url),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "verify": self._ssl,
            "timeout": _WAIT_S,
        }
        self._client = httpx.Client(**self._options)
        weakref.finalize(self, self._client.close)
        self._known: tuple[float, KnownTexts] | None = None
        self._model: str | None = None

    def known(self) -> KnownTexts:
        """A list of at most half a minute ago."""
        if (known := self._fresh()) is None:
            pages: list[httpx.Response] = []
            with _explained():
                while more := _next(pages):
                    pages.append(self._client.get("texts", params=more))
            known = self._keep(pages)
        return known

    async def aknown(self) -> KnownTexts:
        if (known := self._fresh()) is None:
            pages: list[httpx.Response] = []
            with _explained():
                async with httpx.AsyncClient(**self._options) as client:
                    while more := _next(pages):
                        pages.append(await client.get("texts", params=more))
            known = self._keep(pages)
        return known

    def model_name(self) -> str:
        """Asked once, and not again where the service does not say."""
        if self._model is None:
            with suppress(httpx.HTTPError):
                self._model = _first_model(self._client.get("models", timeout=_BRIEFLY_S))
        return self._model or ""

    async def amodel_name(self) -> str:
        if self._model is None:
            with suppress(httpx.HTTPError):
                async with httpx.AsyncClient(**self._options) as client:
                    self._model = _first_model(await client.get("models", timeout=_BRIEFLY_S))
        return self._model or ""

    def token_ids(self, text: str) -> list[int]:
        with self._asked(_Post("tokenize", {"text": text})) as response:
            tokens: list[int] = response.json()["tokens"]
            return tokens

    def count(self, question: str, chunks: Sequence[Given]) -> int:
        body = {"question": question, "documents": [given.text for given in chunks]}
        with self._asked(_Post("tokenize", body)) as response:
            return int(response.json()["count"])

    def search(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        with self._asked(_search(question, k, neighbours)) as response:
            return _documents(response.json())

    async def asearch(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        async with self._aasked(_search(question, k, neighbours)) as response:
            return _documents(json.loads(await response.aread()))

    def ask(self, request: ChatRequest) -> tuple[str, Finished]:
        """The whole answer at once."""
        with self._asked(_chat(request, stream=False)) as response:
            return _whole(response.json())

    async def aask(self, request: ChatRequest) -> tuple[str, Finished]:
        async with self._aasked(_chat(request, stream=False)) as response:
            return _whole(json.loads(await response.aread()))

    def stream(self, request: ChatRequest) -> Generator[str | Finished, None, None]:
        events = _Events()
        with self._asked(_chat(request, stream=True)) as response:
            for line in response.iter_lines():
                yield from events.read(line)
        yield events.finished()

    async def astream(self, request: ChatRequest) -> AsyncGenerator[str | Finished, None]:
        events = _Events()
        async with self._aasked(_chat(request, stream=True)) as response:
            async for line in response.aiter_lines():
                for piece in events.read(line):
                    yield piece
        yield events.finished()

    @contextmanager
    def _asked(self, post: _Post) -> Iterator[httpx.Response]:
        for left in range(self.max_retries, -1, -1):
            try:
                with _explained(post.timeout), self._client.stream("POST", **post.args) as response:
                    if response.is_error:
                        response.read()
                    if not (left and response.status_code in _AGAIN):
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
    async def _aasked(self, post: _Post) -> AsyncIterator[httpx.Response]:
        # A client belongs to one event loop, and LangChain asks from any: each has its own.
        async with httpx.AsyncClient(**self._options) as client:
            for left in range(self.max_retries, -1, -1):
                try:
                    with _explained(post.timeout):
                        async with client.stream("POST", **post.args) as response:
                            if response.is_error:
                                await response.aread()
                            if not (left and response.status_code in _AGAIN):
                                _check(response)
                                yield response
                                return
                            pause = _pause(response)
                except _Unreachable:
                    if not left:
                        raise
                    pause = 1.0
                await asyncio.sleep(pause)

    def _fresh(self) -> KnownTexts | None:
        if self._known is None or time.monotonic() - self._known[0] > _KNOWN_S:
            return None
        return self._known[1]

    def _keep(self, pages: list[httpx.Response]) -> KnownTexts:
        entries = [entry for page in pages for entry in page.json()["data"]]
        known = KnownTexts(Given(entry["text"], entry["id"]) for entry in entries)
        self._known = time.monotonic(), known
        return known


class _Unreachable(RagCacheError):
    """There is nobody at that address."""


class _Events:
    """Reads server-sent events: pieces as they come, the rest when they are through."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._reason = "stop"

    def read(self, line: str) -> Iterator[str]:
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RagCacheError(f"the service gave up: {_message(event)}. Ask again")
        for name in ("model", "usage", "ragcache"):
            if event.get(name):
                self._last[name] = event[name]
        for choice in event.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            if piece := (choice.get("delta") or {}).get("content"):
                yield piece

    def finished(self) -> Finished:
        return _finished(self._last, self._reason)


@dataclass(frozen=True, slots=True)
class _Post:
    """A request to one of the service's routes."""

    url: str
    json: dict[str, Any]
    timeout: float = _WAIT_S
    stream: bool = False

    @property
    def args(self) -> dict[str, Any]:
        return {"url": self.url, "json": replace_surrogates_in(self.json), "timeout": self.timeout}


def _first_model(response: httpx.Response) -> str:
    """The one that a list of models has; empty where it is no such list."""
    try:
        return "" if response.is_error else str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return ""


def _search(question: str, k: int | None, neighbours: int | None) -> _Post:
    wanted = {"question": question, "top_k": k, "neighbours": neighbours}
    return _Post("search", {name: value for name, value in wanted.items() if value is not None})


def _documents(body: Mapping[str, Any]) -> list[Document]:
    """Named as :func:`ragcache.langchain.documents.as_document` does."""
    return [
        Document(
            found["text"],
            id=found["document"] if found["chunks"] == 1 else found["id"],
            metadata=metadata(found["metadata"]),
        )
        for found in body["data"]
    ]


def _chat(request: ChatRequest, *, stream: bool) -> _Post:
    body: dict[str, Any] = {
        "model": request.model or "ragcache",
        "messages": [{"role": "user", "content": request.question}],
        "documents": [
            {"text": c.text} if c.id is None else {"id": c.id, "text": c.text}
            for c in request.chunks
        ],
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    body |= {name: v for name in _SAMPLING if (v := getattr(request, name)) is not None}
    if request.stop:
        body["stop"] = list(request.stop)
    wanted = {"mode": request.mode, "ratio": request.ratio}
    if wanted := {name: value for name, value in wanted.items() if value is not None}:
        body["ragcache"] = wanted
    timeout = _WAIT_S if request.timeout is None else request.timeout
    return _Post("chat/completions", body, timeout, stream)


@contextmanager
def _explained(seconds: float = _WAIT_S) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimeoutError(f"the service gave no answer within {seconds} seconds") from error
    except httpx.ConnectError as error:
        raise _Unreachable(
            f"no service answers at {error.request.url}: {error}. Start one, or check base_url."
        ) from error
    except httpx.HTTPError as error:
        raise RagCacheError(f"the service cannot be asked: {error}. Check base_url") from error


def _next(pages: list[httpx.Response]) -> dict[str, int] | None:
    """What to ask for behind these pages of texts; None behind the last. Raises as ``_check``."""
    if not pages:
        return {"limit": _PAGE}
    _check(pages[-1])
    body = pages[-1].json()
    return {"limit": _PAGE, "after": body["data"][-1]["row"]} if body["has_more"] else None


def _check(response: httpx.Response) -> None:
    """Raise what a status says; the body of an error has been read."""
    if not response.is_error:
        return
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text[:200]
    said = f"the service answered {response.status_code}: {message}"
    if response.status_code in {401, 403}:
        raise ConfigError(f"{said}. Check api_key.")
    if response.status_code in {400, 413, 422}:
        raise PromptError(said)
    raise RagCacheError(said)


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


def _pause(response: httpx.Response) -> float:
    after = response.headers.get("Retry-After", "")
    return min(float(after), _WAIT_S) if after.isdecimal() else 1.0


def _whole(body: dict[str, Any]) -> tuple[str, Finished]:
    (choice,) = body["choices"]
    return choice["message"]["content"] or "", _finished(body, choice.get("finish_reason"))


def _finished(body: Mapping[str, Any], reason: str | None) -> Finished:
    usage = body.get("usage") or {}
    return Finished(
        model=body.get("model") or "ragcache",
        finish_reason="length" if reason == "length" else "stop",
        input_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
        report=dict(body.get("ragcache") or {}),
    )
