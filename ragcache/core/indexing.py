"""Documents into a store: split, embedded, committed, and their chunks' KV computed."""

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
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.key import ChunkKey
from ragcache.types import Chunk, Document, Tokens, invalid_id_reason

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.template import PromptTemplate

__all__ = ["Added", "Indexing", "Split", "Step", "check_bytes", "check_documents", "check_ids"]

logger = logging.getLogger(__name__)

#: Told what is being done, how much of it is done, and how much there is.
#: The same, as a step of work that can be done in pieces.
Step = tuple[str, int, int]
#: Chunks by document.
Split = Mapping[str, list[Chunk]]
_EMBED_BATCH = 64  # chunks embedded and committed at a time
_LOOKED_UP = 64  # chunks that are looked up at a time


@dataclass(frozen=True, slots=True)
class Added:
    """What adding documents did."""

    documents: int  # new or changed
    unchanged: int
    chunks: int  # of the new or changed ones
    precomputed: Precomputed
    overtaken: int = 0  # left out: written or deleted by somebody since they were promised


@dataclass(frozen=True, slots=True)
class Indexing:
    """How documents become chunks with vectors and KV in a store, and what that is stored under."""

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
    ) -> Generator[Step, None, Added]:
        """As :meth:`RagCache.add`, in steps: what is done, how much of it, out of how much.

        A step cuts or embeds up to ``embed_batch`` chunks, or computes the KV of up to
        ``batch_tokens`` tokens. Other work may be done between two steps; of documents that are
        deleted or replaced meanwhile no KV is left. Closed early, it has added the documents that
        were committed.

        With a ``promise`` (:meth:`Catalog.promise`) only those are added that nobody has written
        since it was made. ``split``: what :meth:`iter_split` gave for them; a document that is not
        there is split here.
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
        done = yield from self.iter_compute(written, batch_tokens=batch_tokens, tokens=tokens)
        return Added(len(put), len(unchanged), count, done, len(given) - len(put) - len(unchanged))

    def iter_split(self, documents: Iterable[Document]) -> Generator[Step, None, Split]:
        """Split the documents that are new or changed, in steps: for :meth:`iter_add`. May be done
        on another thread than that of the engine."""
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
        """Its chunks, one by one. ContextError for one that is not to be cut and is so long that it
        cannot fit, before it is tokenised."""
        if WHOLE.items() <= document.metadata.items():
            check_bytes(self.engine, document.text)
        yield from self.splitter.chunks(document)

    def changed(self, documents: Iterable[Document]) -> list[Document]:
        """Those that are new, or are not stored as they are now."""
        return [d for d in documents if self.catalog.document_digest(d.id) != self.digest(d)]

    def iter_compute(
        self,
        documents: Iterable[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        tokens: TokenProgress | None = None,
    ) -> Generator[Step, None, Precomputed]:
        """Compute what is not stored of the chunks of documents that are indexed, by id: the second
        half of :meth:`iter_add`, in steps as that is."""
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
            with suppress(StoreError):  # closed between two steps: what is left over is evicted
                gone = [n for n in keyed if self.catalog.document_digest(n) != digests[n]]
                self.catalog.delete_unused(key.content for name in gone for key in keyed[name])

    def keys(self, document: str) -> list[ChunkKey]:
        """Keys of a document's chunks, as precomputed."""
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
        """Split, embed, ``most`` chunks a step, and commit documents; the number of their chunks,
        and which documents those are.

        An ``expires`` or ``pinned`` that is None stays what it was.
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
            at = 0
            for document, chunks in batch:
                end = at + len(chunks)
                part = chunks, vectors[at:end], contents[at:end]
                if self._put(document, *part, digests, expires, pinned, promise):
                    put.add(document.id)
                    total += len(chunks)
                at = end
            done += len(batch)
            yield "index", done, len(documents)
        return total, put

    def _put(
        self,
        document: Document,
        chunks: list[Chunk],
        vectors: NDArray[np.float32],
        contents: list[bytes],
        digests: dict[str, bytes],
        expires: float | None,
        pinned: bool | None,
        promise: int | None,
    ) -> bool:
        """Commit a document; False where its promise is no longer valid."""
        was = self.catalog.entry(document.id)
        given = document, chunks, vectors, digests[document.id]
        if was is not None:
            expires = was.expires if expires is None else expires
            pinned = was.pinned if pinned is None else pinned
        return self.catalog.put_document(
            *given, contents=contents, expires=expires, pinned=bool(pinned), promise=promise
        )

    def _batches(
        self, documents: Iterable[Document], split: Split, most: int
    ) -> Iterator[list[tuple[Document, list[Chunk]]] | None]:
        """Documents with their chunks in groups of at least ``most`` chunks, the last one
        excepted; None whenever so many chunks have been cut, between which is time for others."""
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
        """Keep how chunks are cut, for whoever opens the store next."""
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
        """Everything that a document's chunks and vectors depend on.

        The tokenizer is the first that chunks of this store were cut with: documents are not cut
        anew for another model, for then the KV that is there would be of no chunk any more.
        """
        h = blake3()
        metadata = (f"{k}={v}" for k, v in sorted(document.metadata.items()))
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
        """Keys of a document's chunks, at most _LOOKED_UP at a time."""
        rows = self.catalog.rows_of(document)
        for first in range(0, len(rows), _LOOKED_UP):
            try:
                chunks = self.catalog.chunks(rows[first : first + _LOOKED_UP])
            except KeyError:  # another thread has deleted or replaced it meanwhile
                return
            yield [self.key(chunk) for chunk in chunks]

    def key(self, chunk: Chunk) -> ChunkKey:
        """What the KV of a chunk is stored under. PromptError if its text is blank."""
        return self.key_of(self.template.chunk(chunk.text))

    def key_of(self, tokens: Tokens) -> ChunkKey:
        """The same, of a chunk's tokens."""
        return self.encoding.key(self.engine.fingerprint, tokens, self.tenant)

    @property
    def prefix_key(self) -> ChunkKey:
        """What the KV of the prompt's own prefix is stored under."""
        return ChunkKey(self.engine.fingerprint, self.template.prefix, tenant=self.tenant)


def check_bytes(engine: ChunkEngine, *texts: str) -> None:
    """Raise ContextError for texts that fit no context together, before they are tokenised: that
    takes as long as they are."""
    have = sum(len(text.encode(errors="replace")) for text in texts)
    most = engine.context_tokens * engine.token_bytes
    if have > most or len(texts) > engine.context_tokens + 2:
        raise ContextError(
            f"{len(texts)} texts of {have} bytes cannot fit: {engine.name} has a context of "
            f"{engine.context_tokens} tokens, of at most {engine.token_bytes} bytes each. Send "
            "less."
        )


def check_documents(documents: Sequence[Document], ttl_s: float | None = None) -> None:
    """Raise SourceError where an id cannot be, or two documents have one: one would replace the
    other; ConfigError for a time to live that is over at once."""
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
    """Raise SourceError for the first that cannot be a document's."""
    for name in ids:
        if (why := invalid_id_reason(name)) is not None:
            raise SourceError(f"{name[:80]!r} cannot be a document's id: {why}. Give another.")
