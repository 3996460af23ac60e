"""Documents into a store: split, embedded, committed, and their chunks' KV computed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from ragcache.compiled import Compiled
from ragcache.errors import ConfigError, SourceError, StoreError
from ragcache.precompute import BATCH_TOKENS, Precomputed, precomputing
from ragcache.retriever.search import Retriever
from ragcache.retriever.split import Splitter
from ragcache.store.base import ChunkStore
from ragcache.store.catalog import Catalog
from ragcache.store.key import ChunkKey
from ragcache.types import Chunk, Document, Tokens

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine

logger = logging.getLogger(__name__)

#: Told what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
#: The same, as a step of work that can be done in pieces.
Step = tuple[str, int, int]
_EMBED_BATCH = 64  # chunks embedded and committed at a time
_LOOKED_UP = 64  # documents whose chunks are looked up at a time


@dataclass(frozen=True, slots=True)
class Added:
    """What adding documents did."""

    documents: int  # new or changed
    unchanged: int
    chunks: int  # of the new or changed ones
    precomputed: Precomputed


@dataclass(frozen=True, slots=True)
class Indexing:
    """How documents become chunks with vectors and KV in a store, and what that is stored under."""

    engine: ChunkEngine
    chunks: ChunkStore  # where KV is put
    catalog: Catalog
    splitter: Splitter
    retriever: Retriever
    compiled: Compiled
    tenant: str

    def adding(
        self,
        documents: Iterable[Document],
        *,
        ttl_s: float | None = None,
        pinned: bool | None = None,
        embed_batch: int = _EMBED_BATCH,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Generator[Step, None, Added]:
        """As :meth:`RagCache.add`, in steps: what is done, how much of it, out of how much.

        A step cuts or embeds up to ``embed_batch`` chunks, or computes the KV of up to
        ``batch_tokens`` tokens. Other work may be done between two steps; of documents that are
        deleted or replaced meanwhile no KV is left. Closed early, it has added the documents that
        were committed.
        """
        given = list(documents)
        check_documents(given, ttl_s)
        self._record_split()
        digests = {d.id: self.digest(d) for d in given}
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
            if number % _LOOKED_UP == 0 or (number == len(names) > _LOOKED_UP):
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

    def keys(self, document: str) -> list[ChunkKey]:
        """Keys of a document's chunks, as precomputed."""
        return [key for key, _ in self._keyed(document)]

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
        for batch in self._batches(documents, most):
            if batch is None:
                yield "index", done, len(documents)
                continue
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

    def _batches(
        self, documents: Iterable[Document], most: int
    ) -> Iterator[list[tuple[Document, list[Chunk]]] | None]:
        """Documents with their chunks in groups of at least ``most`` chunks, the last one
        excepted; None whenever so many chunks have been cut, between which is time for others."""
        batch: list[tuple[Document, list[Chunk]]] = []
        held = 0
        for document in documents:
            chunks: list[Chunk] = []
            for chunk in self.splitter.chunks(document):
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
        settings = (self.splitter.describe(first), self.retriever.embedder.name)
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
        return self.key_of(self.engine.template.chunk(chunk.text))

    def key_of(self, tokens: Tokens) -> ChunkKey:
        """The same, of a chunk's tokens."""
        return self.compiled.key(self.engine.fingerprint, tokens, self.tenant)

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
