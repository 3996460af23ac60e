"""Index documents: split and embed them, commit them to the store, and precompute their KV."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ragcache.core.embedder_identity import embedder_known_as
from ragcache.core.precompute import (
    BATCH_TOKENS,
    Precomputed,
    Steps,
    TokenProgress,
    iter_precompute,
)
from ragcache.errors import ConfigError, ContextError, SourceError, StoreError
from ragcache.planning.context import EncodingContext
from ragcache.retriever.search import Retriever
from ragcache.retriever.split import WHOLE, Splitter
from ragcache.store.base import ChunkStore
from ragcache.store.catalog.catalog import Catalog, DocumentToPut
from ragcache.store.key import ChunkKey
from ragcache.types import Chunk, Document, Tokens, invalid_id_reason

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.template import PromptTemplate

__all__ = ["Added", "Indexing", "Split", "Step", "check_bytes", "check_documents", "check_ids"]

logger = logging.getLogger(__name__)

#: A step of work: the name of the stage, how many of its items are done, and their number in all.
Step = tuple[str, int, int]
#: The chunks of documents, by the document's id.
Split = Mapping[str, list[Chunk]]
_EMBED_BATCH = 64  # chunks that are embedded and committed at a time
_LOOKED_UP = 64  # chunks whose keys are made at a time


@dataclass(frozen=True, slots=True)
class Added:
    """The result of adding documents: numbers of documents, and of the chunks that were added."""

    documents: int  # new or changed
    unchanged: int
    chunks: int  # of the new or changed ones
    precomputed: Precomputed
    overtaken: int = 0  # not added: written or deleted by others after the promise was made

    def __add__(self, other: Added) -> Added:
        return Added(
            self.documents + other.documents,
            self.unchanged + other.unchanged,
            self.chunks + other.chunks,
            self.precomputed + other.precomputed,
            self.overtaken + other.overtaken,
        )


@dataclass(frozen=True, slots=True)
class Indexing:
    """Splits documents into chunks, and stores their vectors and KV, under keys that it makes."""

    engine: ChunkEngine
    template: PromptTemplate  # of the store's prompts
    chunks: ChunkStore  # where KV is put
    catalog: Catalog
    splitter: Splitter
    retriever: Retriever
    encoding: EncodingContext
    tenant: str

    def iter_add(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        promise: int | None = None,
        split: Split | None = None,
        embed_batch: int = _EMBED_BATCH,
        batch_tokens: int = BATCH_TOKENS,
        tokens: TokenProgress | None = None,
        refresh: bool = True,
    ) -> Generator[Step, None, Added]:
        """As :meth:`RagCache.add`, in steps, between which the caller may do other work.

        A step splits or embeds up to ``embed_batch`` chunks, or computes the KV of up to
        ``batch_tokens`` tokens. KV of documents that are deleted or replaced between two steps is
        deleted at the end. If the generator is closed early, the documents that are committed by
        then remain.

        ``promise``: a number from :meth:`Catalog.promise`; documents that were put or deleted
        after it was made are not added. ``split``: the result of :meth:`iter_split`; documents
        without chunks in it are split here. ``refresh``: update the index of vectors, which takes
        time by the size of the store; else the next search does. Raises as :meth:`RagCache.add`.
        """
        given = list(documents)
        check_documents(given, ttl_s)
        self._record_split()
        mine = given
        if promise is not None:
            stands = set(self.catalog.promised(promise, [d.id for d in given]))
            mine = [d for d in given if d.id in stands]
        digests = {d.id: self.digest(d) for d in mine}
        changed = [d for d in mine if self.catalog.document_digest(d.id) != digests[d.id]]
        expires = None if ttl_s is None else time.time() + ttl_s
        count, put = yield from self._index(
            changed, split or {}, digests, expires, pinned, promise, embed_batch
        )
        unchanged = digests.keys() - {d.id for d in changed}
        for name in unchanged:
            if not self.catalog.confirm(
                name, digests[name], expires=expires, pinned=pinned, promise=promise
            ):
                unchanged = unchanged - {name}
        written = [d.id for d in mine if d.id in unchanged or d.id in put]
        done = yield from self.iter_compute(
            written, batch_tokens=batch_tokens, tokens=tokens, refresh=refresh
        )
        return Added(len(put), len(unchanged), count, done, len(given) - len(put) - len(unchanged))

    def iter_split(self, documents: Iterable[Document]) -> Generator[Step, None, Split]:
        """Split new and changed documents, in steps, for :meth:`iter_add`. This does not use the
        engine's model, so it may run on another thread."""
        given, split = list(documents), dict[str, list[Chunk]]()
        yield "split", 0, len(given)
        for number, document in enumerate(given, 1):
            if self.catalog.document_digest(document.id) == self.digest(document):
                continue
            chunks = list[Chunk]()
            for chunk in self.cut(document):
                chunks.append(chunk)
                yield "split", number - 1, len(given)
            split[document.id] = chunks
            yield "split", number, len(given)
        return split

    def cut(self, document: Document) -> Iterator[Chunk]:
        """The chunks of a document, one by one. Raises ContextError, before tokenising, for a
        document that must stay one chunk and is too long for the context."""
        if WHOLE.items() <= document.metadata.items():
            check_bytes(self.engine, document.text)
        yield from self.splitter.chunks(document)

    def changed(self, documents: Iterable[Document]) -> list[Document]:
        """The documents that are not stored, or whose text, metadata or settings have changed."""
        return [d for d in documents if self.catalog.document_digest(d.id) != self.digest(d)]

    def iter_compute(
        self,
        documents: Iterable[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        tokens: TokenProgress | None = None,
        refresh: bool = True,
    ) -> Generator[Step, None, Precomputed]:
        """Compute the missing KV of indexed documents, given by id: the second half of
        :meth:`iter_add`, in the same kind of steps."""
        names, keyed, digests = list(documents), {}, {}
        looked_up = 0
        for number, name in enumerate(names):
            digests[name] = self.catalog.document_digest(name)
            keyed[name] = list[ChunkKey]()
            for some in self._keys_in_steps(name):
                keyed[name] += some
                looked_up += len(some)
                if looked_up >= _LOOKED_UP:
                    looked_up = 0
                    yield "look up", number, len(names)
            self.catalog.add_references(name, [key.content for key in keyed[name]])
        if refresh:
            self.retriever.refresh()
        wanted = [key for keys in keyed.values() for key in keys]
        steps = Steps(
            iter_precompute(
                self.engine,
                self.chunks,
                [self.prefix_key, *wanted] if wanted else [],
                batch_tokens=batch_tokens,
                tokens=tokens,
            )
        )
        try:
            for done, total in steps:
                yield "precompute", done, total
            return steps.result
        finally:
            with suppress(StoreError):  # KV that is not deleted now is evicted later
                gone = [n for n in keyed if self.catalog.document_digest(n) != digests[n]]
                self.catalog.delete_unused(key.content for name in gone for key in keyed[name])

    def keys(self, document: str) -> list[ChunkKey]:
        """The keys under which the KV of a document's chunks is precomputed."""
        return [key for some in self._keys_in_steps(document) for key in some]

    def _index(
        self,
        documents: list[Document],
        split: Split,
        digests: dict[str, bytes],
        expires: float | None,
        pinned: bool | None,
        promise: int | None,
        most: int,
    ) -> Generator[Step, None, tuple[int, set[str]]]:
        """Split, embed and commit documents, at most ``most`` chunks a step. Returns the number of
        committed chunks and the ids of committed documents.

        ``expires`` and ``pinned``: None keeps the document's present value.
        """
        done, total, put = 0, 0, set[str]()
        if documents:
            yield "index", 0, len(documents)
        for batch in self._batches(documents, split, most):
            if batch is None:
                yield "index", done, len(documents)
                continue
            every = [chunk for _, chunks in batch for chunk in chunks]
            parts, contents = [], list[bytes]()
            for first in range(0, max(1, len(every)), most):
                some = every[first : first + most]
                parts.append(self.retriever.embedder.embed([chunk.text for chunk in some]))
                contents += [self.key(chunk).content for chunk in some]
                if first + most < len(every):
                    yield "index", done, len(documents)
            vectors = np.concatenate(parts)
            at, coming = 0, list[DocumentToPut]()
            for document, chunks in batch:
                end = at + len(chunks)
                part = chunks, vectors[at:end], digests[document.id], contents[at:end]
                coming.append(self._to_put(document, *part, expires, pinned))
                at = end
            now = set(self.catalog.put_documents(coming, promise=promise))
            put |= now
            total += sum(len(one.chunks) for one in coming if one.document.id in now)
            done += len(batch)
            yield "index", done, len(documents)
        return total, put

    def _to_put(
        self,
        document: Document,
        chunks: list[Chunk],
        vectors: NDArray[np.float32],
        digest: bytes,
        contents: list[bytes],
        expires: float | None,
        pinned: bool | None,
    ) -> DocumentToPut:
        was = self.catalog.entry(document.id)
        if was is not None:
            expires = was.expires if expires is None else expires
            pinned = was.pinned if pinned is None else pinned
        return DocumentToPut(document, chunks, vectors, digest, contents, expires, bool(pinned))

    def _batches(
        self, documents: Iterable[Document], split: Split, most: int
    ) -> Iterator[list[tuple[Document, list[Chunk]]] | None]:
        """Documents with their chunks, in groups of at least ``most`` chunks except for the last.
        Also yields None after every ``most`` chunks of a document that is split here, so that the
        caller can do other work."""
        batch: list[tuple[Document, list[Chunk]]] = []
        held = 0
        for document in documents:
            chunks = split.get(document.id)
            if chunks is None:
                chunks = list[Chunk]()
                for chunk in self.cut(document):
                    chunks.append(chunk)
                    if len(chunks) % most == 0:
                        yield None
            batch.append((document, chunks))
            held += len(chunks)
            if held >= most:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def _record_split(self) -> None:
        """Record in the store how documents are split, as the default for its next use."""
        now, before = self.splitter.chunk_tokens, self.catalog.get_setting("chunk_tokens")
        if before != str(now):
            if before is not None and self.catalog.entries():
                logger.warning(
                    "chunks have up to %d tokens from now on, and had up to %s: what is indexed "
                    "now is split anew, other documents are when they are indexed again",
                    *(now, before),
                )
            self.catalog.put_setting("chunk_tokens", str(now))
        if self.catalog.get_setting("tokenizer") is None:
            self.catalog.put_setting("tokenizer", self.splitter.tokenizer_label)

    def digest(self, document: Document) -> bytes:
        """blake3 over everything that a document's chunks and vectors depend on, 32 bytes.

        This includes the tokenizer with which the store's first document was split, not the
        engine's: another model must not split documents again, since stored KV would then belong
        to no chunk.
        """
        h = blake3()
        metadata = (f"{_escaped(k)}={v}" for k, v in sorted(document.metadata.items()))
        first = self.catalog.get_setting("tokenizer") or ""
        settings = (
            self.splitter.describe(first),
            embedder_known_as(self.catalog, self.retriever.embedder),
        )
        for text in (document.text, *metadata, *settings):
            raw = text.encode()
            h.update(len(raw).to_bytes(8, "little") + raw)
        return h.digest()

    def _keys_in_steps(self, document: str) -> Iterator[list[ChunkKey]]:
        """The keys of a document's chunks, at most ``_LOOKED_UP`` at a time."""
        rows = self.catalog.rows_of(document)
        for first in range(0, len(rows), _LOOKED_UP):
            try:
                chunks = self.catalog.chunks(rows[first : first + _LOOKED_UP])
            except KeyError:  # another thread has deleted or replaced it meanwhile
                return
            yield [self.key(chunk) for chunk in chunks]

    def key(self, chunk: Chunk) -> ChunkKey:
        """The key of a chunk's KV. Raises PromptError if its text is blank."""
        return self.key_of(self.template.chunk(chunk.text))

    def key_of(self, tokens: Tokens) -> ChunkKey:
        """The key of the KV of a chunk with these tokens."""
        return self.encoding.key(self.engine.fingerprint, tokens, self.tenant)

    @property
    def prefix_key(self) -> ChunkKey:
        """The key of the KV of the prefix that all prompts of the store begin with."""
        return ChunkKey(self.engine.fingerprint, self.template.prefix, tenant=self.tenant)


def check_bytes(engine: ChunkEngine, *texts: str) -> None:
    """Raise ContextError for texts that certainly exceed the engine's context together, judged by
    their bytes: tokenising takes time in proportion to the length of a text."""
    have = sum(len(text.encode(errors="replace")) for text in texts)
    most = engine.context_tokens * engine.token_bytes
    if have > most or len(texts) > engine.context_tokens + 2:
        raise ContextError(
            f"{len(texts)} texts of {have} bytes cannot fit: {engine.name} has a context of "
            f"{engine.context_tokens} tokens, of at most {engine.token_bytes} bytes each. Send "
            "less."
        )


def check_documents(documents: Sequence[Document], ttl_s: float | None = None) -> None:
    """Raise SourceError for an invalid id, and for two documents with one id, of which one would
    replace the other; ConfigError unless ``ttl_s`` is above 0 or None."""
    check_ids(d.id for d in documents)
    count = Counter(d.id for d in documents)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise SourceError(
            f"{len(twice)} ids are given to several documents, the first is {twice[0]!r}: one "
            "would replace the other. Give each document an id of its own."
        )
    if ttl_s is not None and not ttl_s > 0:
        raise ConfigError(f"ttl_s is {ttl_s}: give more than 0 seconds, or nothing to keep")


def check_ids(ids: Iterable[str]) -> None:
    """Raise SourceError for the first id that is not valid."""
    for name in ids:
        if (why := invalid_id_reason(name)) is not None:
            raise SourceError(f"{name[:80]!r} cannot be a document's id: {why}. Give another.")


def _escaped(key: str) -> str:
    """A key whose first unescaped ``=`` is the one after it."""
    return key.replace("\\", "\\\\").replace("=", "\\=")
