"""RagCache: documents in, fused answers out. The façade that CLI, API and LangChain call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from ragcache import setup
from ragcache.blend import Blender, blender
from ragcache.core.embedder_identity import record_embedder
from ragcache.core.generate import GenerationStream, Generator, LocalGenerator
from ragcache.core.indexing import Added, Indexing, Progress, check_bytes
from ragcache.core.precompute import Counted, drive
from ragcache.core.request import PromptRequest, Request, RequestOptions
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.template import SEPARATOR
from ragcache.errors import ConfigError, ContextError, NoChunksError, PromptError, StoreError
from ragcache.models import TINY, model_path
from ragcache.models.named import full_name, remember
from ragcache.planning.controller import controls
from ragcache.planning.cost_model import Speeds
from ragcache.planning.profile import Profile
from ragcache.retriever.embed import Embedder
from ragcache.retriever.search import Retriever
from ragcache.retriever.split import Splitter
from ragcache.settings import Ratio, Settings
from ragcache.store.base import ChunkStore
from ragcache.store.catalog.catalog import Catalog, Entry
from ragcache.store.disk.outbox import Level
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey, at_level
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Answer, Chunk, Document, Passage, Prompt, Sampling
from ragcache.util.several import several

if TYPE_CHECKING:
    from ragcache.store.remote.store import Traffic
    from ragcache.vllm.engine import VllmEngine

_MAP_BESIDE = 1 << 37  # bytes of LMDB's map: a process has addresses for a thousand such stores
_SAMPLE = 24  # documents whose first chunk is read to see how fast that is


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
        self._owns_engine = False  # whether :meth:`close` closes the engine too
        self.catalog = Catalog(store)
        #: Of the prompts: the engine's, with the store's own date where it has one.
        self.template = setup.resolve_prompt_template(self.catalog, engine, settings)
        encoding = setup.resolve_encoding_context(self.catalog, engine, settings, self.template)
        splitter = Splitter(
            lambda text: len(engine.tokenize(text.strip() + SEPARATOR)),  # as template.chunk does
            setup.resolve_chunk_tokens(self.catalog, engine, settings),
            tokenizer_name=dict(engine.fingerprint.fields)["tokenizer"],
        )
        self.retriever = Retriever(
            self.catalog,
            embedder,
            path / "vectors.index",
            settings.index,
            may_save=lambda: store.refusal() is None,
        )
        local = engine if isinstance(engine, Engine) else None
        pin = local is not None and local.upload is not None
        self.remote = setup.attach_remote(store, engine, settings, pin=pin)
        setup.record_kv_shapes(store, engine.fingerprint, self.remote.levels if self.remote else ())
        #: Where KV is put, and what answers read from: the store, over a remote if there is one,
        #: and behind a tier in RAM.
        self.chunks: ChunkStore = self.remote or store
        if settings.ram_bytes and local is not None:  # servers hold what they read
            self.chunks = RamTier(self.chunks, settings.ram_bytes, pin=pin)
        self.indexing = Indexing(
            engine,
            self.template,
            self.chunks,
            self.catalog,
            splitter,
            self.retriever,
            encoding,
            tenant,
        )
        self.profile = Profile(engine, self.chunks, self.catalog)
        self.generator: Generator
        if isinstance(engine, Engine):
            self.generator = LocalGenerator(engine, self.chunks, encoding, tenant)
        else:
            from ragcache.vllm.stream import VllmGenerator

            self.generator = VllmGenerator(engine, self.chunks, encoding, tenant)

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: str | None = None,
        settings: Settings | None = None,
        *,
        beside: RagCache | None = None,
        tenant: str = "",
        loading: Callable[[str], object] | None = None,
        lazy: bool = False,
    ) -> Self:
        """Open, or make, the store in folder ``path``.

        The model and the embedder are those the store was built with unless ``model`` or
        ``settings`` name others; a new store takes the small model that ships. A store's own are
        loaded only where this user has named them before, on this machine. Chunks computed by
        another model are misses, never answers. ``beside``: share the model and embedder of
        another one. Keys of KV are ``tenant``'s. ``loading`` is told the model's name before it is
        loaded. ``lazy``: the store is there; become the one process that writes it with the first
        change, and where another one is that, answer all the same and store nothing: reports say
        so. Raises StoreError (LockedError without ``lazy``), ModelError or ConfigError.
        """
        from ragcache.engine.hf.device import resolve_device
        from ragcache.engine.hf.engine import TransformersEngine

        settings = settings or Settings.load()
        path = Path(path)
        store = DiskStore(
            path,
            lazy=lazy,
            layout=settings.layout,
            map_size=1 << 40 if beside is None else _MAP_BESIDE,
            quota=Quota(settings.max_bytes, settings.tenant_bytes),
            policy=settings.eviction,
            pin=resolve_device(settings.device).type == "cuda",
        )
        try:
            catalog = Catalog(store)
            named = model or settings.model
            if beside is not None:
                name = named or beside.catalog.get_setting("model") or TINY
            else:
                name = setup.resolve_model_name(catalog, named)
                if loading is not None:
                    loading(name)
            engine: Engine | VllmEngine
            if beside is not None:
                engine = beside.engine
            elif settings.engine == "vllm":
                engine = _servers(model_path(name), path, settings, catalog)
            else:
                engine = TransformersEngine.load(
                    model_path(name),
                    device=settings.device,
                    dtype=settings.dtype,
                    codec=setup.resolve_codec(catalog, settings, model_path(name)),
                    kernels=settings.kernels,
                )
            embedder = (
                beside.retriever.embedder if beside else setup.load_embedder(catalog, settings)
            )
            record_embedder(catalog, embedder)
            cache = cls(engine, store, embedder, path, settings, tenant=tenant)
            setup.record_settings(catalog, model=full_name(name))
            for given in filter(None, (named, settings.embedder)):
                remember(given)
            cache._owns_engine = beside is None
        except BaseException:
            store.close()
            raise
        return cache

    def add(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        progress: Progress | None = None,
        tokens: Counted | None = None,
    ) -> Added:
        """Split, embed and store documents, and precompute their chunks' KV.

        A document whose id and text are already there is left alone; one whose text changed is
        replaced, and KV that only its old text used is gone. Killed at any point, a second call
        does only what is missing: documents are committed a batch at a time, chunks one by one.

        ``ttl_s``: seconds from now after which the documents are deleted. ``pinned``: their KV is
        not evicted. What is not given stays as it was; new documents are kept, and not pinned.
        ``progress`` is told stage, done and total after every batch, and ``tokens`` of how many
        tokens the KV has been computed, and of how many it will be.
        ConfigError for one document that is in no list.
        """
        given = several(documents, "documents")
        steps = self.indexing.adding(given, ttl_s=ttl_s, pinned=pinned, tokens=tokens)
        return drive(steps, progress)

    def delete(self, documents: Iterable[str]) -> list[str]:
        """Delete documents by id, and the KV that no other one uses; the ids that were there.
        ConfigError for one id that is in no list."""
        given = several(documents, "documents")
        return [name for name in given if self.catalog.delete_document(name)]

    def documents(self) -> list[Entry]:
        """All documents, by id; those whose time is over are deleted first, or left out where
        another process writes the store."""
        over = self._expire()
        return [entry for entry in self.catalog.entries() if entry.id not in over]

    def ask(self, question: str, **options: Unpack[RequestOptions]) -> Answer:
        """Retrieve, fuse, answer. Options: see :class:`ragcache.core.request.RequestOptions`."""
        return self.generate(Request(question, **options)).answer

    def stream(self, question: str, **options: Unpack[RequestOptions]) -> GenerationStream:
        """The same answer piece by piece; ``.answer`` once the pieces are through."""
        return self.generate(Request(question, **options))

    def generate(self, request: Request) -> GenerationStream:
        """Start the answer to a request: nothing is computed until the stream is read.

        Where nothing is found, or no chunk is given, the stream's ``no_chunks`` and the report say
        why; where the request or the settings require chunks, that is a NoChunksError. The first
        answer with ``ratio`` auto from a store measures :meth:`speeds`, before its own time begins;
        a mode that names its ratio, a finished one, and one that has none are used as they are.
        Raises ConfigError or PromptError before any work is done; ContextError says what there is
        no room for.
        """
        blender, automatic = self._blender(request.mode, request.ratio)
        began = time.perf_counter()
        if not request.question.strip():
            raise PromptError("the question is empty: ask something")
        passages = self._passages(request, blender)
        retrieval_s = time.perf_counter() - began if request.chunks is None else 0.0
        without = None if passages else self._without(request)
        texts = [passage.chunk.text for passage in passages]
        prompt = self.template.prompt(texts, request.question, request.lead)
        sampling = request.sampling or self.default_sampling
        _check_fits(self.engine, prompt, passages, sampling.max_tokens)
        return self.generator.stream(
            PromptRequest(
                prompt,
                blender,
                sampling,
                tuple(passages),
                retrieval_s,
                without,
                self.profile.speeds(lambda: self._sample(prompt)) if automatic else None,
                request.check,
                request.keep,
            )
        )

    def _passages(self, request: Request, blender: Blender) -> list[Passage]:
        """The chunks that were given, or else those that are found."""
        texts = request.question, request.lead
        if request.chunks is None:
            check_bytes(self.engine, *texts)
            self.check_usable(blender)
            return self.retrieve(request.question, request.top_k, request.neighbours)
        given = several(request.chunks, "chunks")
        passages = [_passage(chunk, number) for number, chunk in enumerate(given)]
        check_bytes(self.engine, *texts, *(passage.chunk.text for passage in passages))
        return passages

    def _without(self, request: Request) -> str:
        """Why there are no chunks. NoChunksError where there must be some."""
        why = self.no_chunks() if request.chunks is None else "none were given"
        required = request.require_chunks
        if self.settings.require_chunks if required is None else required:
            raise NoChunksError(
                f"there are no chunks to answer from: {why}. Add documents, or allow answers "
                "without (require_chunks)."
            )
        return why

    @property
    def default_sampling(self) -> Sampling:
        """What the settings say of sampling."""
        s = self.settings
        return Sampling(max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p)

    def no_chunks(self) -> str:
        """Why no question finds anything here, as far as that is known."""
        whose = f"the store of tenant {self.tenant}" if self.tenant else "the store"
        documents, chunks = self.catalog.size
        if not documents:
            return f"{whose} holds no documents"
        if not chunks:
            return f"the {documents} documents of {whose} have no text"
        return f"nothing was retrieved from the {chunks} chunks of {whose}"

    def speeds(self, *, anew: bool = False) -> Speeds | None:
        """How fast this model computes, and loads from this store; None where nothing is stored
        that it can use. Measured once, or ``anew``."""
        return self.profile.measure(self._sample()) if anew else self.profile.speeds(self._sample)

    def retrieve(
        self, question: str, top_k: int | None = None, neighbours: int | None = None
    ) -> list[Passage]:
        """The nearest chunks with their neighbours, chunks of a document in its order.

        Documents whose time is over are deleted first, or left out where another process writes
        the store.
        """
        check_bytes(self.engine, question)
        over = self._expire()
        top_k = self.settings.top_k if top_k is None else top_k
        neighbours = self.settings.neighbours if neighbours is None else neighbours
        return self.retriever.retrieve(question, top_k, neighbours=neighbours, without=over)

    def close(self) -> None:
        try:
            self.chunks.close()
        finally:
            if self._owns_engine:
                self.engine.close()

    def _expire(self) -> list[str]:
        """Delete the documents whose time is over; those that are still there all the same."""
        now = time.time()
        over = self.catalog.over(now)
        if over and self.catalog.refusal() is None:
            self.catalog.expire(now)
            return []
        return over

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
        keys = {key for entry in self.catalog.entries() for key in self.indexing.keys(entry.id)}
        keys.add(self.indexing.prefix_key)
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

    def _sample(self, prompt: Prompt | None = None) -> Iterator[ChunkKey]:
        """The prefix, and chunks from all over the store; else those of ``prompt``."""
        yield self.indexing.prefix_key
        entries = self.catalog.entries()
        for entry in entries[:: 1 + len(entries) // _SAMPLE]:
            with suppress(KeyError):  # deleted meanwhile
                first = self.catalog.chunks(self.catalog.rows_of(entry.id)[:1])
                yield from map(self.indexing.key, first)
        if not entries and prompt is not None:
            yield from map(self.indexing.key_of, prompt.chunks)

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


def _servers(name: str | Path, path: Path, settings: Settings, catalog: Catalog) -> VllmEngine:
    """vLLM servers that were started with the store in ``path``."""
    try:
        from ragcache.vllm.engine import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine vllm needs {error.name}: pip install 'ragcache-fusion[vllm]'"
        ) from error
    if settings.dtype == "auto":
        raise ConfigError(
            "engine vllm needs to know the dtype that the servers were started with, for it is in "
            "every chunk's key: give --dtype float32, bfloat16 or float16"
        )
    key = settings.vllm_key.get_secret_value() if settings.vllm_key else ""
    urls = [url for url in settings.vllm_url.split(",") if url.strip()]
    own = setup.resolve_codec(catalog, settings, name)
    return VllmEngine(name, urls, path, dtype=settings.dtype, codec=own, api_key=key)
