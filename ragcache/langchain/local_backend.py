"""The backend of a store in this process: all of its work is done on one thread.

The engine, its tokenizer and the embedder are not thread-safe, while LangChain calls from thread
pools and event loops. So all work that needs them runs on a scheduler's thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from langchain_core.documents import Document

from ragcache.api.scheduler import Scheduler
from ragcache.api.serialize import report_json
from ragcache.api.ticket_queue import DeadlineExceeded
from ragcache.api.token_counts import count_prompt
from ragcache.core.request import Request
from ragcache.engine.json_format import response_schema
from ragcache.errors import ConfigError
from ragcache.langchain.backend import AnswerMetadata, ChatRequest, SearchRequest
from ragcache.langchain.documents import as_document
from ragcache.models.trusted_names import absolute_name
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import Answer, Chunk, Sampling

_Result = TypeVar("_Result")
_Run = Callable[[Callable[[], None]], Iterator[Any]]

_QUEUE = 1 << 20  # requests: callers in this process wait, and none is refused

#: A folder can be opened only once in a process, so all objects that name it share one backend for
#: as long as any of them lives.
_OPEN: weakref.WeakValueDictionary[Path, LocalBackend] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


class LocalBackend:
    """A RagCache and the thread that its work is done on. See :class:`Backend`.

    An open RagCache is left to its owner to close; a folder is closed when the last object that
    uses it is deleted, or the process ends.
    """

    def __init__(self, cache: RagCache, *, owned: bool) -> None:
        self.cache = cache
        self.scheduler = Scheduler(queue=_QUEUE)
        weakref.finalize(self, _close, self.scheduler, cache if owned else None)

    @classmethod
    def open(
        cls, store: str | Path | RagCache, model: str = "", settings: Settings | None = None
    ) -> LocalBackend:
        """The backend of a store's folder, or of an open RagCache.

        ``model`` and ``settings`` are for a folder that is not open yet. Raises what
        :meth:`RagCache.open` raises, and ConfigError for a ``store`` of another type.
        """
        with _OPENING:
            if isinstance(store, RagCache):
                path = store.store.tables.path.resolve()
                backend = _OPEN.get(path)
                if backend is None or backend.cache is not store:
                    backend = _OPEN[path] = cls(store, owned=False)
                return backend
            if not isinstance(store, (str, Path)):
                raise ConfigError(
                    f"store is a {type(store).__name__}: give the folder of a store, an open "
                    "RagCache, or a RagCacheVectorStore"
                )
            path = Path(store).resolve()
            backend = _OPEN.get(path)
            if backend is None:
                cache = RagCache.open(path, model or None, settings)
                backend = _OPEN[path] = cls(cache, owned=True)
            return backend

    def run(self, work: Callable[[RagCache], _Result]) -> _Result:
        """Call ``work`` on the engine's thread and return its result. Raises what it raises."""
        (result,) = self._pieces(lambda _: map(work, [self.cache]))
        return result  # type: ignore[no-any-return]

    async def arun(self, work: Callable[[RagCache], _Result]) -> _Result:
        """The same, without blocking the event loop."""
        (result,) = [piece async for piece in self._apieces(lambda _: map(work, [self.cache]))]
        return result  # type: ignore[no-any-return]

    def model_name(self) -> str:
        return self.cache.engine.name

    async def amodel_name(self) -> str:
        return self.model_name()

    def token_ids(self, text: str) -> list[int]:
        return self.run(lambda cache: list(cache.engine.tokenize(text)))

    def count(self, request: ChatRequest) -> int:
        return self.run(lambda cache: count_prompt(cache, self._request(request)).count)

    def search(self, request: SearchRequest) -> list[Document]:
        return self.run(lambda cache: _retrieve(cache, request))

    async def asearch(self, request: SearchRequest) -> list[Document]:
        return await self.arun(lambda cache: _retrieve(cache, request))

    def ask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]:
        *pieces, metadata = self._pieces(self._answer(request), request.timeout)
        return "".join(pieces), metadata

    async def aask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]:
        items = [piece async for piece in self._apieces(self._answer(request), request.timeout)]
        return "".join(items[:-1]), items[-1]

    def stream(self, request: ChatRequest) -> Generator[str | AnswerMetadata, None, None]:
        with closing(self._pieces(self._answer(request), request.timeout)) as pieces:
            yield from pieces

    async def astream(self, request: ChatRequest) -> AsyncGenerator[str | AnswerMetadata, None]:
        async with aclosing(self._apieces(self._answer(request), request.timeout)) as pieces:
            async for piece in pieces:
                yield piece

    def _answer(self, request: ChatRequest) -> _Run:
        """Generates an answer. The KV of chunks that are not stored yet is stored before the answer
        ends, so that the next request finds it."""

        def run(check: Callable[[], None]) -> Generator[str | AnswerMetadata, None, None]:
            self._check_model(request.model)
            with closing(self.cache.generate(self._request(request, check))) as stream:
                yield from stream
                yield self._metadata(stream.answer)

        return run

    def _request(self, request: ChatRequest, check: Callable[[], None] | None = None) -> Request:
        documents = enumerate(request.documents)
        return Request(
            messages=request.messages,
            chunks=[Chunk(one.id or "documents", n, one.text) for n, one in documents],
            instructions=request.instructions,
            template=request.template,
            documents_in=request.documents_in,
            find_chunks=request.find_chunks,
            mode=request.mode,
            ratio=request.ratio,
            misses=request.misses,
            require_chunks=request.require_chunks,
            sampling=self._sampling(request),
            check=check,
        )

    def _check_model(self, model: str) -> None:
        names = {"", self.cache.engine.name, self.cache.catalog.get_setting("model") or ""}
        if not {model, absolute_name(model)} & names:
            raise ConfigError(
                f"model {model!r} is requested, but the store was opened with "
                f"{self.cache.engine.name}: give the model where the store is opened first"
            )

    def _sampling(self, request: ChatRequest) -> Sampling:
        default = self.cache.default_sampling
        return Sampling(
            max_tokens=default.max_tokens if request.max_tokens is None else request.max_tokens,
            temperature=default.temperature if request.temperature is None else request.temperature,
            top_p=default.top_p if request.top_p is None else request.top_p,
            stop=request.stop,
            seed=request.seed,
            json_schema=response_schema(request.response_format),
        )

    def _metadata(self, answer: Answer) -> AnswerMetadata:
        report = answer.report
        return AnswerMetadata(
            model=self.cache.engine.name,
            finish_reason="length" if answer.stopped == "length" else "stop",
            input_tokens=report.prompt_tokens,
            cached_tokens=report.cached_tokens,
            output_tokens=len(answer.tokens),
            report=json.loads(
                json.dumps(report_json(answer))
            ),  # tuples become lists, as in the service's response
        )

    def _pieces(self, run: _Run, seconds: float | None = None) -> Generator[Any, None, None]:
        events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        ticket = self.scheduler.submit(
            "", _once(run), lambda *event: events.put(event), seconds=seconds
        )
        try:
            while (piece := _next(*events.get(), seconds)) is not _DONE:
                yield piece
        finally:
            ticket.cancel()

    async def _apieces(self, run: _Run, seconds: float | None = None) -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def on_event(*event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.scheduler.submit("", _once(run), on_event, seconds=seconds)
        try:
            while (piece := _next(*(await events.get()), seconds)) is not _DONE:
                yield piece
        finally:
            ticket.cancel()


_DONE = object()


def _once(run: _Run) -> _Run:
    """``run``, without a reference that would keep its LocalBackend alive once it has run: the
    scheduler keeps its last ticket."""
    runs = [run]
    return lambda check: runs.pop()(check)


def _next(kind: str, value: Any, seconds: float | None) -> Any:
    """The piece of an event, or _DONE; raises the exception of a failed request."""
    if kind == "piece":
        return value
    if kind == "done":
        return _DONE
    if isinstance(value, DeadlineExceeded):
        raise TimeoutError(f"there was no answer within {seconds} seconds") from value
    raise value


def _retrieve(cache: RagCache, request: SearchRequest) -> list[Document]:
    passages = cache.retrieve(request.question, **request.options)
    return [as_document(cache.catalog, passage.chunk) for passage in passages]


def _close(scheduler: Scheduler, cache: RagCache | None) -> None:
    if threading.current_thread().name.startswith("ragcache-"):
        # The finalizer may run on any thread, and a thread of the scheduler cannot wait for itself.
        threading.Thread(target=_close, args=(scheduler, cache)).start()
        return
    scheduler.close()
    if cache is not None:
        cache.close()
