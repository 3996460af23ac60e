"""A client of vLLM's HTTP API for completions: token ids in, token ids out."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from ragcache.errors import ModelError, PromptError, RagCacheError
from ragcache.vllm.router import Router

_CONNECT_S = 5.0
_READ_TIMEOUT_S = 600.0  # between two events


class ServerUnreachable(Exception):
    """A server cannot be reached, or has stopped in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class _ServedModel:
    """The model that a server serves."""

    model: str  # the server's name for it
    context_tokens: int  # limit of prompt and answer together


class VllmClient:
    """Sends requests to several servers, from an event loop in a thread of its own. Thread-safe."""

    def __init__(self, replicas: Router, *, api_key: str = "") -> None:
        self.replicas = replicas
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._served: dict[str, _ServedModel] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ragcache-vllm", daemon=True
        )
        self._thread.start()
        self._http = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_S)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)

    def close(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def served_models(self) -> dict[str, _ServedModel]:
        """The models of the servers that answer, by URL. Raises ModelError if none does."""
        found, wrong = {}, []
        for url in self.replicas.urls:
            try:
                found[url] = asyncio.run_coroutine_threadsafe(
                    self._fetch_model(url), self._loop
                ).result()
            except ServerUnreachable as error:
                wrong.append(str(error))
        if not found:
            raise ModelError(
                f"no vLLM server answers: {'; '.join(wrong)}. Start one, or check --base-url."
            )
        return found

    def complete(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """A completion. Raises ServerUnreachable, or PromptError with the server's message."""
        with self.replicas.count_request(url):
            return asyncio.run_coroutine_threadsafe(self._complete(url, body), self._loop).result()

    def stream(self, url: str, body: dict[str, Any]) -> _TokenStream:
        """Start a streamed completion."""
        return _TokenStream(self, url, body)

    async def _fetch_model(self, url: str) -> _ServedModel:
        """The model of a server, requested once."""
        if url not in self._served:
            try:
                response = await self._http.get(f"{url}/v1/models")
                response.raise_for_status()
                model = response.json()["data"][0]
                self._served[url] = _ServedModel(str(model["id"]), int(model["max_model_len"]))
            except (httpx.HTTPError, ValueError, LookupError) as error:
                self.replicas.mark_down(url)
                raise ServerUnreachable(f"{url}: {error or type(error).__name__}") from error
            self.replicas.mark_up(url)
        return self._served[url]

    async def _complete(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            payload = {"model": (await self._fetch_model(url)).model, **body}
            response = await self._http.post(f"{url}/v1/completions", json=payload)
        except httpx.HTTPError as error:
            raise self._unreachable(url, error) from error
        _check(url, response.status_code, response.content)
        return dict(response.json())

    async def _tokens(self, url: str, body: dict[str, Any]) -> AsyncIterator[int]:
        """Tokens of a completion; Unreachable where it breaks off before its end."""
        payload = {**body, "stream": True, "return_token_ids": True}
        try:
            payload["model"] = (await self._fetch_model(url)).model
            async with self._http.stream("POST", f"{url}/v1/completions", json=payload) as response:
                if response.status_code != 200:
                    _check(url, response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return
                    event = json.loads(line.removeprefix("data: "))
                    if (error := event.get("error")) is not None:
                        raise ServerUnreachable(f"{url}: {error}")
                    for choice in event["choices"]:
                        for token in choice.get("token_ids") or ():
                            yield int(token)
                        if choice.get("finish_reason") in ("stop", "length"):
                            return
        except httpx.HTTPError as error:
            raise self._unreachable(url, error) from error
        raise self._unreachable(url, "the answer was cut off")

    def _unreachable(self, url: str, error: object) -> ServerUnreachable:
        self.replicas.mark_down(url)
        self._served.pop(url, None)
        return ServerUnreachable(f"{url}: {error or type(error).__name__}")


class _TokenStream:
    """The tokens of one streamed completion, which any thread can read."""

    def __init__(self, client: VllmClient, url: str, body: dict[str, Any]) -> None:
        self._client, self._url = client, url
        self._events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._task = asyncio.run_coroutine_threadsafe(self._read(body), client._loop)

    async def _read(self, body: dict[str, Any]) -> None:
        try:
            with self._client.replicas.count_request(self._url):
                async for token in self._client._tokens(self._url, body):
                    self._events.put(token)
            self._events.put(None)
        except BaseException as error:
            self._events.put(error)
            raise

    def poll(self, wait_s: Callable[[], float]) -> Iterator[int | None]:
        """Yield tokens, and None whenever none has arrived for ``wait_s()`` seconds.

        Raises the error that ended the stream.
        """
        while True:
            try:
                event = self._events.get(timeout=wait_s())
            except queue.Empty:
                yield None
                continue
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            yield event

    def close(self) -> None:
        """Cancel the request; the server stops generating."""
        self._task.cancel()


def _check(url: str, status: int, content: bytes) -> None:
    """Raise for a response that is no success: Unreachable where another server may do better."""
    if status == 200:
        return
    message = content[:500].decode(errors="replace")
    if status >= 500 or status in (408, 429):
        raise ServerUnreachable(f"{url}: {status}: {message}")
    kind: type[RagCacheError] = ModelError if status in (401, 403, 404) else PromptError
    raise kind(f"vLLM at {url} refuses the request ({status}): {message}")
