"""A store in this process: one thread for all of its work, whoever asks.

The engine, its tokenizer and the embedder take one thing at a time, while LangChain asks from pools
of threads and from event loops. So everything that needs them is handed to a scheduler's thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from langchain_core.documents import Document

from ragcache.api.counting import prompt_counts
from ragcache.api.scheduler import Scheduler, TooLate
from ragcache.api.serialize import report_json
from ragcache.core.request import Request
from ragcache.errors import ConfigError
from ragcache.langchain.backend import ChatRequest, Finished
from ragcache.langchain.chunk_parsing import Given, KnownTexts
from ragcache.langchain.documents import as_document
from ragcache.models.trusted_names import absolute_name
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.types import Answer, Chunk, Sampling

Result = TypeVar("Result")
Run = Callable[[Callable[[], None]], Iterator[Any]]

_QUEUE = 1 << 20  # whoever batches in this process waits: nobody is sent away

#: A folder can be opened once in a process, so all who name it share it for as long as any of them
#: lives.
_OPEN: weakref.WeakValueDictionary[Path, Local] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


class Local:
    """A RagCache and the thread that its work is done on. See :class:`Backend`.

    An open RagCache stays its owner's to close; a folder is closed when the last one who uses it
    is gone, or the process ends.
    """

    def __init__(self, cache: RagCache, *, owned: bool) -> None:
        self.cache = cache
        self.scheduler = Scheduler(queue=_QUEUE)
        self._known: tuple[int, KnownTexts] = (-1, KnownTexts())
        weakref.finalize(self, _close, self.scheduler, cache if owned else None)

    @classmethod
    def of(cls, store: Any, model: str = "", settings: Settings | None = None) -> Local:
        """Of a folder, an open RagCache, or anything of this package that has a store.

        ``model`` and ``settings`` are for a folder that is not open yet. Raises what
        :meth:`RagCache.open` raises, and ConfigError for a store that is none.
        """
        if isinstance(local := getattr(store, "local", store), Local):
            return local
        with _OPENING:
            if isinstance(store, RagCache):
                path = store.store.tables.path.resolve()
                known = _OPEN.get(path)
                if known is None or known.cache is not store:
                    known = _OPEN[path] = cls(store, owned=False)
                return known
            if not isinstance(store, (str, Path)):
                raise ConfigError(
                    f"store is a {type(store).__name__}: give the folder of a store, an open "
                    "RagCache, or a RagCacheVectorStore"
                )
            path = Path(store).resolve()
            known = _OPEN.get(path)
            if known is None:
                cache = RagCache.open(path, model or None, settings)
                known = _OPEN[path] = cls(cache, owned=True)
            return known

    def do(self, work: Callable[[RagCache], Result]) -> Result:
        """Do this where the engine works, and wait for it. Raises what it raises."""
        (result,) = self._pieces(lambda _: map(work, [self.cache]))
        return result  # type: ignore[no-any-return]

    async def ado(self, work: Callable[[RagCache], Result]) -> Result:
        """The same without blocking the event loop."""
        (result,) = [piece async for piece in self._apieces(lambda _: map(work, [self.cache]))]
        return result  # type: ignore[no-any-return]

    def known(self) -> KnownTexts:
        """See :class:`Backend`. Read anew when documents have changed."""
        catalog = self.cache.catalog
        generation, known = self._known
        if generation != (now := catalog.generation):
            known = KnownTexts(_stored(catalog))
            self._known = now, known
        return known

    async def aknown(self) -> KnownTexts:
        return await asyncio.to_thread(self.known)

    def model_name(self) -> str:
        return self.cache.engine.name

    async def amodel_name(self) -> str:
        return self.model_name()

    def token_ids(self, text: str) -> list[int]:
        return self.do(lambda cache: list(cache.engine.tokenize(text)))

    def count(self, question: str, chunks: Sequence[Given]) -> int:
        texts = [given.text for given in chunks]
        return self.do(lambda cache: prompt_counts(cache.template, question, texts).count)

    def search(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        return self.do(lambda cache: _found(cache, question, k, neighbours))

    async def asearch(self, question: str, k: int | None, neighbours: int | None) -> list[Document]:
        return await self.ado(lambda cache: _found(cache, question, k, neighbours))

    def ask(self, request: ChatRequest) -> tuple[str, Finished]:
        *pieces, finished = self._pieces(self._answer(request), request.timeout)
        return "".join(pieces), finished

    async def aask(self, request: ChatRequest) -> tuple[str, Finished]:
        told = [piece async for piece in self._apieces(self._answer(request), request.timeout)]
        return "".join(told[:-1]), told[-1]

    def stream(self, request: ChatRequest) -> Generator[str | Finished, None, None]:
        with closing(self._pieces(self._answer(request), request.timeout)) as pieces:
            yield from pieces

    async def astream(self, request: ChatRequest) -> AsyncGenerator[str | Finished, None]:
        async with aclosing(self._apieces(self._answer(request), request.timeout)) as pieces:
            async for piece in pieces:
                yield piece

    def _answer(self, request: ChatRequest) -> Run:
        """KV of chunks that are not stored yet is stored before the end is told: whoever asks the
        same thing next finds it."""

        def run(check: Callable[[], None]) -> Generator[str | Finished, None, None]:
            self._check_model(request.model)
            stream = self.cache.generate(
                Request(
                    request.question,
                    chunks=[_chunk(given, n) for n, given in enumerate(request.chunks)],
                    mode=request.mode,
                    ratio=request.ratio,
                    sampling=self._sampling(request),
                    check=check,
                )
            )
            yield from stream
            yield self._finished(stream.answer)

        return run

    def _check_model(self, model: str) -> None:
        ours = {"", self.cache.engine.name, self.cache.catalog.get_setting("model") or ""}
        if not {model, absolute_name(model)} & ours:
            raise ConfigError(
                f"model {model!r} is asked for, but {self.cache.engine.name} is open: name the "
                "model where the store is opened first"
            )

    def _sampling(self, request: ChatRequest) -> Sampling:
        default = self.cache.default_sampling
        return Sampling(
            max_tokens=default.max_tokens if request.max_tokens is None else request.max_tokens,
            temperature=default.temperature if request.temperature is None else request.temperature,
            top_p=default.top_p if request.top_p is None else request.top_p,
            stop=request.stop,
            seed=request.seed,
        )

    def _finished(self, answer: Answer) -> Finished:
        r = answer.report
        return Finished(
            model=self.cache.engine.name,
            finish_reason="length" if answer.stopped == "length" else "stop",
            input_tokens=r.prefix_tokens + r.chunk_tokens + r.question_tokens,
            cached_tokens=r.reused_tokens,
            output_tokens=len(answer.tokens),
            report=json.loads(json.dumps(report_json(answer))),  # lists, as the service answers
        )

    def _pieces(self, run: Run, seconds: float | None = None) -> Generator[Any, None, None]:
        told: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        ticket = self.scheduler.submit(
            "", _once(run), lambda *what: told.put(what), seconds=seconds
        )
        try:
            while (piece := _next(*told.get(), seconds)) is not _DONE:
                yield piece
        finally:
            ticket.give_up()

    async def _apieces(self, run: Run, seconds: float | None = None) -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def tell(*what: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(told.put_nowait, what)

        ticket = self.scheduler.submit("", _once(run), tell, seconds=seconds)
        try:
            while (piece := _next(*(await told.get()), seconds)) is not _DONE:
                yield piece
        finally:
            ticket.give_up()


_DONE = object()


def _once(run: Run) -> Run:
    """Nothing that is done may keep its Local alive: the scheduler remembers its last ticket."""
    runs = [run]
    return lambda check: runs.pop()(check)


def _next(how: str, what: Any, seconds: float | None) -> Any:
    """The piece that was told, or the end; raises what went wrong."""
    if how == "piece":
        return what
    if how == "done":
        return _DONE
    if isinstance(what, TooLate):
        raise TimeoutError(f"there was no answer within {seconds} seconds") from what
    raise what


def _found(cache: RagCache, question: str, k: int | None, neighbours: int | None) -> list[Document]:
    passages = cache.retrieve(question, k, neighbours)
    return [as_document(cache.catalog, passage.chunk) for passage in passages]


def _chunk(given: Given, number: int) -> Chunk:
    """Named as its giver does; ``document#ordinal`` is how chunks of a split document are."""
    if given.id is None:
        return Chunk("given", number, given.text)
    document, mark, ordinal = given.id.rpartition("#")
    if mark and ordinal.isdecimal():
        return Chunk(document, int(ordinal), given.text)
    return Chunk(given.id, 0, given.text)


def _stored(catalog: Catalog) -> Iterator[Given]:
    """All chunks, called as :func:`ragcache.langchain.documents.as_document` does."""
    for entry in catalog.entries():
        with suppress(KeyError):  # deleted or replaced meanwhile: its rows are gone
            for chunk in catalog.chunks(catalog.rows_of(entry.id)):
                yield Given(chunk.text, entry.id if entry.chunks == 1 else chunk.id)


def _close(scheduler: Scheduler, cache: RagCache | None) -> None:
    if threading.current_thread().name.startswith("ragcache-"):
        # Memory may be collected on any thread; one of the scheduler's cannot wait for itself.
        threading.Thread(target=_close, args=(scheduler, cache)).start()
        return
    scheduler.close()
    if cache is not None:
        cache.close()
