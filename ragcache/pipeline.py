"""RagCache: documents in, fused answers out. The façade that CLI, API and LangChain call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from blake3 import blake3

from ragcache.answer import Answering, Answers, AnswerStream
from ragcache.blend import Blender, blender
from ragcache.compiled import Compiled, compiled
from ragcache.controller import controls
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.template import SEPARATOR
from ragcache.errors import ConfigError, ContextError, PromptError, SourceError, StoreError
from ragcache.models import TINY, model_path
from ragcache.precompute import BATCH_TOKENS, Precomputed, precomputing, through
from ragcache.profile import Profile
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.retriever.search import Retriever
from ragcache.retriever.split import Splitter
from ragcache.settings import Ratio, Settings
from ragcache.speeds import Speeds
from ragcache.store.base import ChunkStore
from ragcache.store.capacity import Quota
from ragcache.store.catalog import Catalog, Entry
from ragcache.store.codecs import codec
from ragcache.store.disk import DiskStore
from ragcache.store.key import ChunkKey, at_level
from ragcache.store.outbox import Level
from ragcache.store.tier import TieredStore
from ragcache.types import Answer, Chunk, Document, Passage, Prompt, Sampling, Tokens

if TYPE_CHECKING:
    from ragcache.store.remote import RemoteStore, Traffic
    from ragcache.vllm.remote import VllmEngine

#: Told what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
#: The same, as a step of work that can be done in pieces.
Step = tuple[str, int, int]
_MAP_BESIDE = 1 << 37  # bytes of LMDB's map: a process has addresses for a thousand such stores
_EMBED_BATCH = 64  # chunks embedded and committed at a time
_LOOKED_UP = 64  # documents whose chunks are looked up at a time
_SAMPLE = 24  # documents whose first chunk is read to see how fast that is


@dataclass(frozen=True, slots=True)
class Added:
    """What adding documents did."""

    documents: int  # new or changed
    unchanged: int
    chunks: int  # of the new or changed ones
    precomputed: Precomputed


class RagCache:
    """A folder of documents, their chunks' KV, and a model that answers from them.

    >>> from ragcache import Document, RagCache
    >>> import tempfile
    >>> with RagCache.open(tempfile.mkdtemp()) as cache:
    ...     added = cache.add([Document("a", "Mira Holt lives in Oslo.")])
    ...     answer = cache.ask("Where does Mira Holt live?")
    >>> added.documents, answer.report.mode
    (1, 'fused')
    """

    def __init__(
        self,
        engine: Engine | VllmEngine,
        store: DiskStore,
        embedder: Embedder,
        path: Path,
        settings: Settings,
        *,
        tenant: str = "",
    ) -> None:
        self.engine, self.store, self.settings, self.tenant = engine, store, settings, tenant
        self._checked = False
        self._hangs_up: Callable[[], None] | None = None
        self.catalog = Catalog(store)
        self.compiled = _compiled(self.catalog, engine, settings)
        self.splitter = Splitter(
            lambda text: len(engine.tokenize(text.strip() + SEPARATOR)),  # as template.chunk does
            _chunk_tokens(self.catalog, engine, settings),
            tokenizer_name=dict(engine.fingerprint.fields)["tokenizer"],
        )
        self.retriever = Retriever(self.catalog, embedder, path / "vectors.index", settings.index)
        pin = isinstance(engine, Engine) and engine.upload is not None
        self.remote = _remote(store, engine, settings, pin=pin)
        #: Where KV is put, and what answers read from: the store, over a remote if there is one,
        #: and behind a tier in RAM.
        self.chunks: ChunkStore = self.remote or store
        if settings.ram_bytes and isinstance(engine, Engine):  # servers hold what they read
            self.chunks = TieredStore(self.chunks, settings.ram_bytes, pin=pin)
        self.profile = Profile(engine, self.chunks, self.catalog)
        self.answers: Answers
        if isinstance(engine, Engine):
            self.answers = Answering(engine, self.chunks, self.compiled, tenant)
        else:
            self.answers = engine.answering(self.chunks, self.compiled, tenant)

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: str | None = None,
        settings: Settings | None = None,
        *,
        beside: RagCache | None = None,
        tenant: str = "",
    ) -> Self:
        """Open, or make, the store in folder ``path``.

        The model and the embedder are those the store was built with unless ``model`` or
        ``settings`` name others; a new store takes the small model that ships. Chunks computed by
        another model are misses, never answers. ``beside``: share the model and embedder of
        another one. Keys of KV are ``tenant``'s. Raises StoreError, ModelError or ConfigError.
        """
        from ragcache.engine.transformers import TransformersEngine, as_device

        settings = settings or Settings.load()
        path = Path(path)
        store = DiskStore(
            path,
            layout=settings.layout,
            map_size=1 << 40 if beside is None else _MAP_BESIDE,
            quota=Quota(settings.max_bytes, settings.tenant_bytes),
            policy=settings.eviction,
            pin=as_device(settings.device).type == "cuda",
        )
        try:
            catalog = Catalog(store)
            built_with = catalog if beside is None else beside.catalog
            name = model or settings.model or built_with.get_setting("model") or TINY
            engine: Engine | VllmEngine
            if beside is not None:
                engine = beside.engine
            elif settings.engine == "vllm":
                engine = _servers(model_path(name), path, settings, _codec(catalog, settings))
            else:
                engine = TransformersEngine.load(
                    model_path(name),
                    device=settings.device,
                    dtype=settings.dtype,
                    codec=_codec(catalog, settings),
                )
            embedder = beside.retriever.embedder if beside else _embedder(catalog, settings)
            cache = cls(engine, store, embedder, path, settings, tenant=tenant)
            if beside is None and not isinstance(engine, Engine):
                cache._hangs_up = engine.close
        except BaseException:
            store.close()
            raise
        for key, value in {"model": name, "embedder": embedder.name}.items():
            if catalog.get_setting(key) is None:
                catalog.put_setting(key, value)
        return cache

    def add(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Split, embed and store documents, and precompute their chunks' KV.

        A document whose id and text are already there is left alone; one whose text changed is
        replaced, and KV that only its old text used is gone. Killed at any point, a second call
        does only what is missing: documents are committed a batch at a time, chunks one by one.

        ``ttl_s``: seconds from now after which the documents are deleted. ``pinned``: their KV is
        not evicted. What is not given stays as it was; new documents are kept, and not pinned.
        """
        return through(self.adding(documents, ttl_s=ttl_s, pinned=pinned), progress)

    def adding(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        embed_batch: int = _EMBED_BATCH,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Generator[Step, None, Added]:
        """As :meth:`add`, a step at a time: what is being done, how much of it, out of how much.

        A step embeds up to ``embed_batch`` chunks, or computes the KV of up to ``batch_tokens``
        tokens. Other work may be done between two steps; of documents that are deleted or replaced
        meanwhile no KV is left. Closed early, it has added the documents that were committed.
        """
        given = list(documents)
        check_documents(given, ttl_s)
        digests = {d.id: self._digest(d) for d in given}
        changed = [d for d in given if self.catalog.document_digest(d.id) != digests[d.id]]
        expires = None if ttl_s is None else time.time() + ttl_s
        count = yield from self._index(changed, digests, expires, pinned, embed_batch)
        if expires is not None or pinned is not None:
            for name in digests.keys() - {d.id for d in changed}:
                self.catalog.keep(name, expires=expires, pinned=pinned)
        done = yield from self.computing(digests, batch_tokens=batch_tokens)
        return Added(len(changed), len(given) - len(changed), count, done)

    def computing(
        self, documents: Iterable[str], *, batch_tokens: int = BATCH_TOKENS
    ) -> Generator[Step, None, Precomputed]:
        """Compute what is not stored of the chunks of documents that are indexed, by id: the second
        half of :meth:`adding`, in steps as that is."""
        names, keyed, digests = list(documents), {}, {}
        for number, name in enumerate(names, 1):
            digests[name] = self.catalog.document_digest(name)
            keyed[name] = self._keyed(name)
            self.catalog.use(name, [key.content for key, _ in keyed[name]])
            if number % _LOOKED_UP == 0:
                yield "look up", number, len(names)
        self.retriever.refresh()
        chunks_of = {key: chunk for pairs in keyed.values() for key, chunk in pairs}
        steps = precomputing(
            self.engine,
            self.chunks,
            [self.prefix_key, *chunks_of] if chunks_of else [],
            company=lambda key: self._company(chunks_of.get(key)),
            batch_tokens=batch_tokens,
        )
        try:
            return (yield from _named("precompute", steps))
        finally:
            with suppress(StoreError):  # closed between two steps: what is left over is evicted
                gone = [n for n in keyed if self.catalog.document_digest(n) != digests[n]]
                self.catalog.let_go(key.content for name in gone for key, _ in keyed[name])

    def delete(self, documents: Iterable[str]) -> list[str]:
        """Delete documents by id, and the KV that no other one uses; the ids that were there."""
        return [name for name in documents if self.catalog.delete_document(name)]

    def documents(self) -> list[Entry]:
        """All documents, by id; those whose time is over are deleted first."""
        self.catalog.expire(time.time())
        return self.catalog.entries()

    def ask(self, question: str, **options: Any) -> Answer:
        """Retrieve, fuse, answer. Options as for :meth:`stream`."""
        return self.stream(question, **options).answer

    def stream(
        self,
        question: str,
        *,
        mode: str | Blender | None = None,
        ratio: Ratio | None = None,
        top_k: int | None = None,
        neighbours: int | None = None,
        chunks: Sequence[str | Chunk | Passage] | None = None,
        lead: str = "",
        sampling: Sampling | None = None,
        check: Callable[[], None] | None = None,
        keep: bool = True,
    ) -> AnswerStream:
        """Answer piece by piece; ``.answer`` has the Report once the pieces are through.

        ``chunks`` are used instead of retrieval, which goes by the question alone. ``lead`` stands
        between the chunks and the question, such as instructions or earlier turns; it is always
        computed. What is not given comes from the settings.
        ``check`` and ``keep`` as for :meth:`Answering.stream`.
        ``ratio`` auto suits the machine (see :mod:`ragcache.controller`); the first such answer
        from a store measures :meth:`speeds`, before its own time begins. A ``mode`` that names its
        ratio, a finished one, and one that has none are used as they are.
        Raises ConfigError or PromptError before any work is done; ContextError says what there is
        no room for.
        """
        with_mode, chosen = self._blender(mode, ratio)
        began = time.perf_counter()
        if not question.strip():
            raise PromptError("the question is empty: ask something")
        if chunks is None:
            self.check_usable(with_mode)
            passages = self.retrieve(question, top_k, neighbours)
        else:
            passages = [_passage(chunk, number) for number, chunk in enumerate(chunks)]
        retrieval_s = time.perf_counter() - began
        prompt = self.engine.template.prompt([p.chunk.text for p in passages], question, lead)
        sampling = sampling or self._sampling()
        _check_fits(self.engine, prompt, passages, sampling.max_tokens)
        return self.answers.stream(
            prompt,
            with_mode,
            sampling,
            passages=passages,
            retrieval_s=retrieval_s if chunks is None else 0.0,
            speeds=self.profile.speeds(lambda: self._sample(prompt)) if chosen else None,
            check=check,
            keep=keep,
        )

    def speeds(self, *, anew: bool = False) -> Speeds | None:
        """How fast this model computes, and loads from this store; None where nothing is stored
        that it can use. Measured once, or ``anew``."""
        return self.profile.measure(self._sample()) if anew else self.profile.speeds(self._sample)

    def retrieve(
        self, question: str, top_k: int | None = None, neighbours: int | None = None
    ) -> list[Passage]:
        """The nearest chunks with their neighbours, chunks of a document in its order.

        Documents whose time is over are deleted first.
        """
        self.catalog.expire(time.time())
        top_k = self.settings.top_k if top_k is None else top_k
        neighbours = self.settings.neighbours if neighbours is None else neighbours
        return self.retriever.retrieve(question, top_k, neighbours=neighbours)

    def keys(self, document: str) -> list[ChunkKey]:
        """Keys of a document's chunks, as precomputed."""
        return [key for key, _ in self._keyed(document)]

    def close(self) -> None:
        self.chunks.close()
        if self._hangs_up is not None:
            self._hangs_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def usable(self) -> tuple[int, int]:
        """Stored chunks that the open model can use, and all stored chunks."""
        return self.store.stats().usable(self.engine.fingerprint)

    def levels(self) -> dict[bytes, list[Level]]:
        """Key digests of the documents' chunks, and the levels that a remote is sent of each."""
        names = () if self.remote is None else self.remote.levels
        keys = {key for entry in self.catalog.entries() for key in self.keys(entry.id)}
        keys.add(self.prefix_key)
        return {key.digest: [Level.of(at_level(key, name)) for name in names] for key in keys}

    def traffic(self) -> Traffic | None:
        """What has gone to the remote and come from it; None without one."""
        return None if self.remote is None else self.remote.traffic

    def check_usable(self, mode: Blender) -> None:
        """Refuse to answer from a store that was built with another model altogether."""
        if mode.behind == "nothing" or self._checked:
            return
        usable, total = self.usable()
        if total and not usable and self.remote is None:
            built = ", ".join(self.store.stats().fingerprints)
            raise StoreError(
                f"0 of {total} stored chunks are usable: built for {built}, the engine is "
                f"{self.engine.fingerprint}. Open the store with the model that built it, or run "
                "`ragcache index` with this one, which adds its KV and keeps what is there."
            )
        self._checked = True

    def _index(
        self,
        documents: list[Document],
        digests: dict[str, bytes],
        expires: float | None,
        pinned: bool | None,
        most: int,
    ) -> Generator[Step, None, int]:
        """Split, embed, ``most`` chunks a step, and commit documents; the number of their chunks.

        An ``expires`` or ``pinned`` that is None stays what it was.
        """
        done = total = 0
        if documents:
            yield "index", 0, len(documents)
        for batch in _batches(((d, self.splitter.split(d)) for d in documents), most):
            texts = [chunk.text for _, chunks in batch for chunk in chunks]
            parts = []
            for first in range(0, max(1, len(texts)), most):
                parts.append(self.retriever.embedder.embed(texts[first : first + most]))
                if first + most < len(texts):
                    yield "index", done, len(documents)
            vectors = np.concatenate(parts)
            at = 0
            for document, chunks in batch:
                part = vectors[at : at + len(chunks)]
                was = self.catalog.entry(document.id)
                self.catalog.put_document(
                    document,
                    chunks,
                    part,
                    digests[document.id],
                    contents=[self.key(chunk).content for chunk in chunks],
                    expires=was.expires if was and expires is None else expires,
                    pinned=bool(was and was.pinned) if pinned is None else pinned,
                )
                at += len(chunks)
            done += len(batch)
            total += len(texts)
            yield "index", done, len(documents)
        return total

    def _digest(self, document: Document) -> bytes:
        """Everything that a document's chunks and vectors depend on."""
        h = blake3()
        metadata = (f"{k}={v}" for k, v in sorted(document.metadata.items()))
        settings = (self.splitter.describe(), self.retriever.embedder.name)
        for text in (document.text, *metadata, *settings):
            raw = text.encode()
            h.update(len(raw).to_bytes(8, "little") + raw)
        return h.digest()

    def _keyed(self, document: str) -> list[tuple[ChunkKey, Chunk]]:
        try:
            chunks = self.catalog.chunks(self.catalog.rows_of(document))
        except KeyError:  # another thread deleted or replaced it between the two
            return []
        return [(self.key(chunk), chunk) for chunk in chunks]

    def key(self, chunk: Chunk) -> ChunkKey:
        """What the KV of a chunk is stored under. PromptError if its text is blank."""
        engine = self.engine
        tokens = engine.template.chunk(chunk.text)
        return self.compiled.key(engine.fingerprint, tokens, self.tenant)

    def _company(self, chunk: Chunk | None) -> Tokens:
        """Tokens of the similar chunks that this one is compiled behind; none for the prefix."""
        if chunk is None or not self.compiled.similar:
            return ()
        others = self.retriever.similar(chunk, self.compiled.similar)
        return tuple(t for other in others for t in self.engine.template.chunk(other.text))

    @property
    def prefix_key(self) -> ChunkKey:
        """What the KV of the prompt's own prefix is stored under."""
        return ChunkKey(self.engine.fingerprint, self.engine.template.prefix, tenant=self.tenant)

    def _sample(self, prompt: Prompt | None = None) -> Iterator[ChunkKey]:
        """The prefix, and chunks from all over the store; else those of ``prompt``."""
        yield self.prefix_key
        entries = self.catalog.entries()
        for entry in entries[:: 1 + len(entries) // _SAMPLE]:
            with suppress(KeyError):  # deleted meanwhile
                yield from map(self.key, self.catalog.chunks(self.catalog.rows_of(entry.id)[:1]))
        if not entries and prompt is not None:
            for tokens in prompt.chunks:
                yield self.compiled.key(self.engine.fingerprint, tokens, self.tenant)

    def _blender(self, mode: str | Blender | None, ratio: Ratio | None) -> tuple[Blender, bool]:
        """The method, and whether its ratio is to be chosen."""
        if ratio is None and (mode is None or self.settings.ratio == "auto"):
            ratio = self.settings.ratio
        mode = self.settings.mode if mode is None else mode
        if ratio != "auto":
            return blender(mode, ratio), False
        made = blender(mode)
        named = not isinstance(mode, str) or "recompute_ratio" in mode
        return made, not named and controls(made)

    def _sampling(self) -> Sampling:
        s = self.settings
        return Sampling(max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p)


def _named(
    stage: str, steps: Generator[tuple[int, int], None, Precomputed]
) -> Generator[Step, None, Precomputed]:
    """The steps, each with the name of what is being done."""
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            finished: Precomputed = end.value
            return finished
        yield stage, done, total


def check_documents(documents: Sequence[Document], ttl_s: float | None = None) -> None:
    """Raise SourceError where two documents have one id: one would replace the other; ConfigError
    for a time to live that is over at once."""
    count = Counter(d.id for d in documents)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise SourceError(
            f"{len(twice)} ids are given to several documents, the first is {twice[0]!r}: one "
            "would replace the other. Give each document an id of its own."
        )
    if ttl_s is not None and not ttl_s > 0:
        raise ConfigError(f"ttl_s is {ttl_s}: give more than 0 seconds, or nothing to keep")


def _check_fits(
    engine: ChunkEngine, prompt: Prompt, passages: Sequence[Passage], max_tokens: int
) -> None:
    """Raise ContextError, with the numbers, where there is no room for prompt and answer."""
    need, have = len(prompt) + max_tokens, engine.context_tokens
    if need <= have:
        return
    message = (
        f"prompt and answer need {need} tokens, but {engine.name} has a context of {have}: "
        f"{len(prompt.prefix)} of instructions, {sum(map(len, prompt.chunks))} in "
        f"{len(prompt.chunks)} chunks, {len(prompt.question)} of question, and room for an answer "
        f"of {max_tokens}."
    )
    room = have - max_tokens - len(prompt.question)
    over = [p.chunk.id for p, (_, end) in zip(passages, prompt.spans, strict=True) if end > room]
    if over:
        message += f" The first chunk that does not fit is {over[0]!r}."
    raise ContextError(f"{message} Give or retrieve fewer chunks, or ask for a shorter answer.")


def _passage(chunk: str | Chunk | Passage, number: int) -> Passage:
    if isinstance(chunk, Passage):
        return chunk
    if isinstance(chunk, str):
        chunk = Chunk("given", number, chunk)
    return Passage(chunk, 0.0)


def _batches(
    items: Iterable[tuple[Document, list[Chunk]]], size: int
) -> Iterable[list[tuple[Document, list[Chunk]]]]:
    """Documents in groups of at least ``size`` chunks, the last one excepted."""
    batch: list[tuple[Document, list[Chunk]]] = []
    for item in items:
        batch.append(item)
        if sum(len(chunks) for _, chunks in batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _chunk_tokens(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> int:
    """The setting, else what the store was built with, else what the packaged embedder reads whole,
    and little enough that 32 chunks fit a context."""
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    recorded = catalog.get_setting("chunk_tokens")
    chosen = int(recorded) if recorded else min(256, engine.context_tokens // 32)
    if recorded is None:
        catalog.put_setting("chunk_tokens", str(chosen))
    return chosen


def _remote(
    store: DiskStore, engine: Engine | VllmEngine, settings: Settings, *, pin: bool
) -> RemoteStore | None:
    """The store over a remote, where the settings have one."""
    if not settings.remote:
        if settings.levels:
            raise ConfigError("levels are what a remote is sent: set remote too, or leave them out")
        return None
    if not isinstance(engine, Engine):
        raise ConfigError(
            "vLLM reads the store in its folder and no remote: leave remote out, and fetch what "
            "is there with `ragcache pull`"
        )
    own = dict(engine.fingerprint.fields).get("codec", "raw")
    if settings.levels and own != "raw":
        raise ConfigError(
            f"levels are made of what is stored, and codec {own} has lost some of it: leave levels "
            "out, or begin a store with codec raw"
        )
    from ragcache.store.remote import shared

    return shared(store, settings.remote, settings.levels, pin=pin)


def _codec(catalog: Catalog, settings: Settings) -> str:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("codec")
    name = codec(settings.codec or recorded or "raw").name
    if recorded is None:
        catalog.put_setting("codec", name)
    return name


def _compiled(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> Compiled:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("compile")
    how = compiled(settings.compile or recorded or "prefix", engine)
    if recorded is None:
        catalog.put_setting("compile", how.mode)
    return how


def _embedder(catalog: Catalog, settings: Settings) -> Embedder:
    """The setting, else the store's own, else the packaged one; ConfigError if they differ."""
    recorded = catalog.get_setting("embedder")
    if settings.embedder and recorded and settings.embedder != recorded:
        raise ConfigError(
            f"the store was embedded with {recorded!r}, and vectors of {settings.embedder!r} "
            "cannot be compared with those. Use the store's own, or index into a new folder."
        )
    name = settings.embedder or recorded
    return SentenceTransformerEmbedder(name) if name else SentenceTransformerEmbedder()


def _servers(name: str | Path, path: Path, settings: Settings, codec: str) -> VllmEngine:
    """vLLM servers that were started with the store in ``path``."""
    try:
        from ragcache.vllm.remote import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine vllm needs {error.name}: pip install 'ragcache[vllm]'"
        ) from error
    if settings.dtype == "auto":
        raise ConfigError(
            "engine vllm needs to know the dtype that the servers were started with, for it is in "
            "every chunk's key: give --dtype float32, bfloat16 or float16"
        )
    key = settings.vllm_key.get_secret_value() if settings.vllm_key else ""
    urls = [url for url in settings.vllm_url.split(",") if url.strip()]
    return VllmEngine(name, urls, path, dtype=settings.dtype, codec=codec, api_key=key)
