"""RagCache: index documents and answer questions. CLI, REST API and LangChain use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from ragcache import setup
from ragcache.blend import Blender, blender
from ragcache.core.calibration import Calibration, recorded_calibration
from ragcache.core.consistent import check_consistent
from ragcache.core.embedder_identity import record_embedder
from ragcache.core.explain import PartHistory
from ragcache.core.generate import GenerationStream, Generator, LocalGenerator
from ragcache.core.indexing import Added, Indexing, check_bytes
from ragcache.core.kept_prompts import KeptPrompts
from ragcache.core.portions import add_stream
from ragcache.core.precompute import TokenProgress, drive
from ragcache.core.prompting import PromptBuilder, question_of, read_template
from ragcache.core.request import (
    PromptRequest,
    Request,
    RequestOptions,
    RetrieveOptions,
    check_asks,
    message_text,
    retrieve_options,
)
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.template import SEPARATOR
from ragcache.errors import ConfigError, ContextError, NoChunksError, PromptError, StoreError
from ragcache.models import TINY, model_path
from ragcache.models.trusted_names import absolute_name, remember_name
from ragcache.planning.controller import controls
from ragcache.planning.cost_model import Speeds
from ragcache.planning.profile import Profile
from ragcache.retriever.embed import Embedder
from ragcache.retriever.known_texts import KnownTexts
from ragcache.retriever.rerank import Reranker
from ragcache.retriever.search import Retriever
from ragcache.retriever.split import Splitter
from ragcache.settings import Ratio, Settings
from ragcache.store.base import ChunkStore
from ragcache.store.catalog.catalog import Catalog, DocumentEntry
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.recode import Recoded, recode
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import codec
from ragcache.store.format.record import TranscodeTarget
from ragcache.store.key import ChunkKey, with_codec
from ragcache.store.tiers.ram import RamTier
from ragcache.types import (
    Answer,
    Chunk,
    Document,
    Explanation,
    Passage,
    Progress,
    Prompt,
    Sampling,
    StageProgress,
)
from ragcache.util.list_argument import require_list

if TYPE_CHECKING:
    from ragcache.store.remote.store import RemoteTraffic
    from ragcache.vllm.engine import VllmEngine

__all__ = ["RagCache"]

_MAP_BESIDE = 1 << 37  # bytes of LMDB's map: a thousand such stores fit into an address space
_NO_PLAIN_QUESTION = (
    "questions were calibrated, and this is a chat or has instructions or a template of its own"
)
_SAMPLE = 24  # documents whose first chunk is read to measure the speed of loading


class RagCache:
    """A store of documents with the KV of their chunks, and a model that answers from them.

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
        chats: KeptPrompts | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        self.engine, self.store, self.settings, self.tenant = engine, store, settings, tenant
        self._checked = False
        self._owns_engine = False  # whether :meth:`close` closes the engine
        #: KV of the latest chats. Stores with one engine share it.
        self.chats = chats or KeptPrompts(settings.chat_bytes)
        self.catalog = Catalog(store)
        #: The chat template of the prompts, with the store's own date if it has one.
        self.template = setup.resolve_prompt_template(self.catalog, engine, settings)
        encoding = setup.resolve_encoding_context(self.catalog, engine, settings, self.template)
        self.encoding = encoding  # in which chunks are precomputed
        splitter = Splitter(
            lambda text: len(engine.tokenize(text.strip() + SEPARATOR)),  # see PromptTemplate.chunk
            setup.resolve_chunk_tokens(self.catalog, engine, settings),
            tokenizer_name=dict(engine.fingerprint.fields)["tokenizer"],
        )
        self.retriever = Retriever(
            self.catalog,
            embedder,
            path / "vectors.index",
            settings.index,
            index_recall=settings.index_recall,
            reranker=reranker,
            count_tokens=splitter.count,
            may_save=lambda: store.refusal() is None,
        )
        local = engine if isinstance(engine, Engine) else None
        pin = local is not None and local.upload is not None
        self.remote = setup.attach_remote(store, engine, settings, pin=pin)
        setup.record_codecs(
            store, engine.fingerprint, self.remote.remote_codecs if self.remote else ()
        )
        #: The store of KV: the store on disk, with the remote and the RAM tier of the settings.
        self.chunks: ChunkStore = self.remote or store
        if settings.ram_bytes and local is not None:  # vLLM servers have caches of their own
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
        self._known: tuple[int, KnownTexts] = (-1, KnownTexts())
        self.prompts = PromptBuilder(
            engine,
            self.template,
            settings.instructions,
            None if settings.template is None else read_template(settings.template),
            settings.documents_in,
            settings.find_chars,
            self.known_texts,
        )
        history = PartHistory(engine, lambda key: self.catalog.uses(key.content))
        self.generator: Generator
        if isinstance(engine, Engine):
            self.generator = LocalGenerator(
                engine, self.chunks, encoding, tenant, history, chats=self.chats
            )
        else:
            from ragcache.vllm.stream import VllmGenerator

            self.generator = VllmGenerator(engine, self.chunks, encoding, tenant, history)

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
        """Open the store in folder ``path``, or create it.

        The model and the embedder are those that the store was built with, unless ``model`` or
        ``settings`` name others; a new store uses the small model of the package. A model that
        only the store names is not loaded unless this user has named it before on this machine.
        Chunks that another model computed count as missing.

        ``beside``: share the model and the embedder of that instance. ``tenant``: part of the keys
        of KV. ``loading``: called with the model's name before it is loaded. ``lazy``: open an
        existing store, and lock it for writing only with the first change; if another process
        has the lock, questions are answered but nothing is stored, and reports say so. Raises
        StoreError (LockedError if another process has the lock, without ``lazy``), ModelError or
        ConfigError.
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
                engine = _connect_servers(model_path(name), path, settings, catalog)
            else:
                stored = setup.resolve_codec(catalog, settings, model_path(name))
                engine = TransformersEngine.load(
                    model_path(name),
                    device=settings.device,
                    dtype=settings.dtype,
                    codec=stored,
                    kernels=settings.kernels,
                )
                setup.settle_codec(catalog, engine, stored, path, settings)
            embedder = (
                beside.retriever.embedder if beside else setup.load_embedder(catalog, settings)
            )
            record_embedder(catalog, embedder)
            cache = cls(
                *(engine, store, embedder, path, settings),
                tenant=tenant,
                chats=None if beside is None else beside.chats,
                reranker=beside.retriever.reranker if beside else setup.load_reranker(settings),
            )
            setup.record_settings(catalog, model=absolute_name(name))
            for given in filter(None, (named, settings.embedder)):
                remember_name(given)
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
        progress: StageProgress | None = None,
        tokens: TokenProgress | None = None,
    ) -> Added:
        """Split, embed and store documents, and precompute the KV of their chunks.

        A document that is stored with the same text is skipped. If its text has changed, it is
        replaced, and KV that only its old text used is deleted. Documents are committed in batches
        and chunks one by one, so after a crash a second call does only what is missing.

        ``ttl_s``: seconds from now after which the documents are deleted. ``pinned``: their KV is
        not evicted. None leaves both as they are; new documents do not expire and are not pinned.
        ``progress`` is called with stage, done and total after every batch, and ``tokens`` with
        the number of tokens whose KV was computed, and their total. Raises ConfigError for a
        single document instead of a list or a ``ttl_s`` of 0 or less, SourceError for invalid or
        repeated ids, and StoreError if the store fails.
        """
        given = require_list(documents, "documents")
        steps = self.indexing.iter_add(given, ttl_s=ttl_s, pinned=pinned, tokens=tokens)
        return drive(steps, progress)

    def add_stream(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        progress: StageProgress | None = None,
        tokens: TokenProgress | None = None,
        before: Callable[[list[Document]], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> Added:
        """As :meth:`add`, for documents of which not all fit in memory, such as those that
        ``read(["docs"])`` yields.

        A portion of up to 500 documents is held, split, embedded and stored, and its KV is
        computed before the next one is read; ``before`` is called with each portion first, and
        ``after`` when it is done. The stages that ``progress`` hears of are those of a portion. An
        id that is repeated, or an error of the iterable, is raised when it is met; what was added
        before it is kept.
        """
        given = require_list(documents, "documents")
        return add_stream(
            self.indexing,
            given,
            ttl_s=ttl_s,
            pinned=pinned,
            progress=progress,
            tokens=tokens,
            before=before,
            after=after,
        )

    def delete(self, documents: Iterable[str]) -> list[str]:
        """Delete documents by id, and the KV that no other document uses. Returns the ids that
        existed. Raises ConfigError for a single id instead of a list."""
        given = require_list(documents, "documents")
        return [name for name in given if self.catalog.delete_document(name)]

    def documents(self) -> list[DocumentEntry]:
        """All documents, by id. Expired ones are deleted first, or left out if another process
        writes the store."""
        over = self._expire()
        return [entry for entry in self.catalog.entries() if entry.id not in over]

    def ask(self, question: str = "", **options: Unpack[RequestOptions]) -> Answer:
        """Answer a question, or a chat (``messages``), from retrieved chunks. Options:
        :class:`ragcache.core.request.RequestOptions`. Raises as :meth:`generate`."""
        return self.generate(Request.of(question, **options)).answer

    def stream(self, question: str = "", **options: Unpack[RequestOptions]) -> GenerationStream:
        """As :meth:`ask`, as an iterator over pieces of the answer's text; its ``answer`` is
        complete after the last piece."""
        return self.generate(Request.of(question, **options))

    def generate(self, request: Request) -> GenerationStream:
        """Retrieve the chunks of a request, and prepare its answer, which is computed while the
        stream is read.

        Without chunks, the stream's ``no_chunks`` and the report say why; if the request or the
        settings require chunks, NoChunksError is raised. The first answer of a store with ``ratio``
        auto first measures :meth:`speeds`, which its times do not include. The ratio of a Blender
        instance, or of a mode that names one or takes none, is not changed. Raises ConfigError or
        PromptError for a wrong request, ContextError if prompt and answer exceed the context, and
        StoreError if no stored chunk is usable with this model.
        """
        return self.generator.stream(self._prepared(request))

    def explain(self, request: Request) -> Explanation:
        """What would be loaded for the prompt of a request now, part by part, and why the rest
        would not. Nothing is answered, stored or counted. Raises as :meth:`generate`."""
        return self.generator.explain(self._prepared(request))

    def _prepared(self, request: Request) -> PromptRequest:
        """The request with its prompt. Raises as :meth:`generate`."""
        calibration, why = recorded_calibration(self.catalog), ""
        if calibration is not None:
            why = calibration.expired(self.engine.fingerprint, self.encoding)
        valid = None if why else calibration
        blender, automatic = self._blender(request.mode, request.ratio, valid)
        misses = request.misses or self.settings.misses
        if misses == "consistent":
            check_consistent(blender)
            automatic = False
        began = time.perf_counter()
        self._check_request(request)
        messages = self._messages(request)
        given, retrieved = self._passages(request, messages, blender)
        retrieval_s = time.perf_counter() - began if retrieved else 0.0
        prompt, passages = self.prompts.build(request, given, messages)
        without = None if passages else self._without(retrieved, request)
        sampling = request.sampling or self.default_sampling
        self.engine.check_sampling(sampling)
        certificate = None
        if calibration is not None:
            why = why or ("" if self.prompts.is_plain(request) else _NO_PLAIN_QUESTION)
            certificate = calibration.certificate(blender, sampling, len(prompt.chunks), why)
        _check_fits(self.engine, prompt, passages, sampling.max_tokens)
        return PromptRequest(
            prompt,
            blender,
            sampling,
            passages=passages,
            retrieval_s=retrieval_s,
            no_chunks=without,
            speeds=self.profile.speeds(lambda: self._sample(prompt)) if automatic else None,
            is_calibrated=valid is not None and blender == valid.blender,
            certificate=certificate,
            misses=misses,
            is_chat=request.messages is not None,
            check=request.check,
            keep=request.keep,
        )

    def prompt(self, request: Request) -> Prompt:
        """The prompt of a request with the chunks that it has; none are retrieved. Raises
        PromptError."""
        passages = [_passage(chunk, number) for number, chunk in enumerate(request.chunks or ())]
        return self.prompts.build(request, passages, self._messages(request)).prompt

    def _messages(self, request: Request) -> list[ChatMessage]:
        if request.messages is None:
            return []
        return self.prompts.read(request.messages, request.find_chunks)

    def with_retrieved(self, request: Request) -> Request:
        """The request with the chunks that are retrieved for it, if it needs any and some are
        found; :meth:`generate` then retrieves none. Raises as :meth:`generate`."""
        blender, _ = self._blender(request.mode, request.ratio)
        self._check_request(request)
        messages = self._messages(request)
        passages, retrieved = self._passages(request, messages, blender)
        # Without passages the chunks stay None, so that the report says why there are none.
        return request.with_chunks(passages) if retrieved and passages else request

    def _check_request(self, request: Request) -> None:
        """Raise PromptError unless the request has a question or messages, and ContextError for
        texts that cannot fit."""
        if request.messages is None:
            if not request.question.strip():
                raise PromptError("the question is empty: ask something")
            check_bytes(self.engine, request.question, request.instructions or "")
            return
        if request.question.strip():
            raise PromptError("give a question or messages, not both")
        require_list(request.messages, "messages")
        check_asks(request.messages)
        check_bytes(self.engine, request.instructions or "", *map(message_text, request.messages))

    def _passages(
        self, request: Request, messages: Sequence[ChatMessage], blender: Blender
    ) -> tuple[list[Passage], bool]:
        """The chunks of the request, or else, unless its messages have chunks, those that are
        retrieved; and whether they were."""
        if request.chunks is None:
            has_chunks = any(each.kind == "chunk" for m in messages for each in m.content)
            question = question_of(messages) if messages else request.question
            if has_chunks or not question:
                self._check_retrieves(request)
                return [], False
            self.check_usable(blender)
            return self.retrieve(question, **retrieve_options(request)), True
        self._check_retrieves(request)
        given = require_list(request.chunks, "chunks")
        passages = [_passage(chunk, number) for number, chunk in enumerate(given)]
        check_bytes(self.engine, *(passage.chunk.text for passage in passages))
        return passages, False

    def _check_retrieves(self, request: Request) -> None:
        """Raise ConfigError for a filter of a request for which nothing is retrieved."""
        if request.filter is not None:
            raise ConfigError(
                "a filter is of the documents to retrieve from, and nothing is retrieved for a "
                "request with chunks of its own, or with long texts that are searched for chunks: "
                "leave out the filter or the chunks, or set find_chunks to false"
            )

    def _without(self, retrieved: bool, request: Request) -> str:
        """Why there are no chunks. Raises NoChunksError if the request requires some."""
        required = request.require_chunks
        why = self.no_chunks(retrieve_options(request)) if retrieved else "none were given"
        if self.settings.require_chunks if required is None else required:
            raise NoChunksError(
                f"there are no chunks to answer from: {why}. Add documents, or allow answers "
                "without (require_chunks)."
            )
        return why

    def known_texts(self) -> KnownTexts:
        """The texts of the stored chunks, read again when documents have changed."""
        generation, known = self._known
        if generation != (now := self.catalog.generation):
            known = KnownTexts((chunk.text, chunk.id) for chunk in self._stored_chunks())
            self._known = now, known
        return known

    def _stored_chunks(self) -> Iterator[Chunk]:
        for entry in self.catalog.entries():
            with suppress(KeyError):  # deleted or replaced meanwhile
                yield from self.catalog.chunks(self.catalog.rows_of(entry.id))

    @property
    def default_sampling(self) -> Sampling:
        """The sampling of the settings, for requests without their own."""
        s = self.settings
        return Sampling(max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p)

    def no_chunks(self, options: RetrieveOptions | None = None) -> str:
        """Why no chunks are retrieved from this store with these options."""
        whose = f"the store of tenant {self.tenant}" if self.tenant else "the store"
        documents, chunks = self.catalog.size
        if not documents:
            return f"{whose} holds no documents"
        if not chunks:
            return f"the {documents} documents of {whose} have no text"
        search = setup.resolve_search(self.settings, options or {})
        values = ((name, getattr(search, name)) for name in ("min_score", "top_tokens"))
        given = [f"{name} {value}" for name, value in values if value is not None]
        if search.filter is not None:
            given.insert(0, "the filter")
        that = f" with {' and '.join(given)}" if given else ""
        if search.top_tokens is not None:
            that += ", in which the best chunk may have no room"
        return f"nothing was retrieved from the {chunks} chunks of {whose}{that}"

    def speeds(self, *, anew: bool = False) -> Speeds | None:
        """How fast this model computes, and how fast its KV is loaded from this store; None if the
        store has no chunk that the model can use. Measured once and recorded in the store;
        ``anew`` measures again."""
        return self.profile.measure(self._sample()) if anew else self.profile.speeds(self._sample)

    def retrieve(self, question: str, **options: Unpack[RetrieveOptions]) -> list[Passage]:
        """The best chunks for a question, and the neighbours of each, as
        :class:`~ragcache.retriever.search_options.SearchOptions` say.

        Options that are absent or None are taken from the settings. Chunks of one document are in
        its order. Expired documents are deleted first, or left out if another process writes the
        store. Raises ConfigError and PromptError as :meth:`Retriever.retrieve`.
        """
        check_bytes(self.engine, question)
        over = self._expire()
        return self.retriever.search(
            question, setup.resolve_search(self.settings, options, without=over)
        )

    def close(self) -> None:
        """Close the store, and the engine unless it is shared with another instance. An index that
        is being built is abandoned: the next instance builds it."""
        try:
            self.retriever.close()
            self.chunks.close()
        finally:
            if self._owns_engine:
                self.engine.close()

    def _expire(self) -> list[str]:
        """Delete expired documents. Returns the ids of those that remain because another process
        has the store's lock."""
        now = time.time()
        over = self.catalog.expired(now)
        if over and self.catalog.refusal() is None:
            self.catalog.expire(now)
            return []
        return over

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def usable(self) -> tuple[int, int]:
        """The number of stored chunks that the open model can use, and of all stored chunks."""
        return self.store.stats().usable(self.engine.fingerprint)

    def remote_copies(self) -> dict[bytes, list[TranscodeTarget]]:
        """The copies in other codecs that the remote stores of each chunk of the documents, by the
        digest of the chunk's key."""
        names = () if self.remote is None else self.remote.remote_codecs
        keys = {key for entry in self.catalog.entries() for key in self.indexing.keys(entry.id)}
        keys.add(self.indexing.prefix_key)
        return {
            key.digest: [TranscodeTarget.of(with_codec(key, name)) for name in names]
            for key in keys
        }

    def recode(self, progress: Progress | None = None) -> Recoded:
        """Encode the stored chunks in the codec that this instance was opened with, which is that
        of the store from then on. See :func:`ragcache.store.disk.recode.recode`.

        Until the last chunk is done, the others count as missing. After a kill, a second call does
        the rest. Raises StoreError.
        """
        own, before = self.engine.fingerprint, self.catalog.get_setting("codec")
        self.catalog.put_setting("codec", own.codec)
        try:
            return recode(self.store, own, self.indexing.encoding.before, progress)
        except StoreError:
            if before is not None and not self.usable()[0]:
                self.catalog.put_setting("codec", before)
            raise

    def traffic(self) -> RemoteTraffic | None:
        """Counts of what was sent to and received from the remote; None without one."""
        return None if self.remote is None else self.remote.traffic

    def check_usable(self, mode: Blender) -> None:
        """Raise StoreError if no stored chunk was computed with the open model."""
        if mode.reuses == "nothing" or self._checked:
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
        """Keys of the prefix and of chunks spread over the store; if it has none, of ``prompt``."""
        yield self.indexing.prefix_key
        entries = self.catalog.entries()
        for entry in entries[:: 1 + len(entries) // _SAMPLE]:
            with suppress(KeyError):  # deleted meanwhile
                first = self.catalog.chunks(self.catalog.rows_of(entry.id)[:1])
                yield from map(self.indexing.key, first)
        if not entries and prompt is not None:
            yield from map(self.indexing.key_of, prompt.chunks)

    def _blender(
        self,
        mode: str | Blender | None,
        ratio: Ratio | None,
        calibration: Calibration | None = None,
    ) -> tuple[Blender, bool]:
        """The fusion method, and whether its ratio is chosen by measured speeds. If the ratio is
        auto and the method is that of a ``calibration``, it has the calibrated ratio."""
        if ratio is None and (mode is None or self.settings.ratio == "auto"):
            ratio = self.settings.ratio
        mode = self.settings.mode if mode is None else mode
        if ratio != "auto":
            return blender(mode, ratio), False
        made = blender(mode)
        if not isinstance(mode, str) or "recompute_ratio" in mode:
            return made, False
        if calibration is not None and calibration.matches(made):
            made = calibration.blender
        return made, controls(made)


def _check_fits(
    engine: ChunkEngine, prompt: Prompt, passages: Sequence[Passage], max_tokens: int
) -> None:
    """Raise ContextError, with the number of tokens of each part, if prompt and answer exceed the
    context."""
    need, have = len(prompt) + max_tokens, engine.context_tokens
    if need <= have:
        return
    chunks = sum(map(len, prompt.chunks))
    message = (
        f"prompt and answer need {need} tokens, but {engine.name} has a context of {have}: "
        f"{chunks} in {len(prompt.chunks)} chunks, {len(prompt) - chunks} of other text, and room "
        f"for an answer of {max_tokens}."
    )
    room = have - max_tokens - len(prompt.question)
    over = [p.chunk.id for p, (_, end) in zip(passages, prompt.spans, strict=True) if end > room]
    if over:
        message += f" The first chunk that does not fit is {over[0]!r}."
    raise ContextError(f"{message} Give less text or fewer chunks, or ask for a shorter answer.")


def _passage(chunk: str | Chunk | Passage, number: int) -> Passage:
    if isinstance(chunk, Passage):
        return chunk
    if isinstance(chunk, str):
        chunk = Chunk("given", number, chunk)
    return Passage(chunk, 0.0)


def _connect_servers(
    name: str | Path, path: Path, settings: Settings, catalog: Catalog
) -> VllmEngine:
    """Connect to vLLM servers that were started with the store in ``path``."""
    try:
        from ragcache.vllm.engine import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine vllm needs {error.name}: pip install 'ragcache-fusion[vllm]'"
        ) from error
    if settings.dtype == "auto":
        raise ConfigError(
            "engine vllm needs the dtype that the servers were started with, because it is part of "
            "every chunk's key: give --dtype float32, bfloat16 or float16"
        )
    key = settings.vllm_key.get_secret_value() if settings.vllm_key else ""
    urls = [url for url in settings.vllm_url.split(",") if url.strip()]
    own = codec(setup.resolve_codec(catalog, settings, name)).name
    return VllmEngine(name, urls, path, dtype=settings.dtype, codec=own, api_key=key)
