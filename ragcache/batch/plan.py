"""Plan the precomputation of a corpus: its chunks, which of them are stored, and the missing work.

The unit of work is a batch of chunks, as :mod:`ragcache.core.precompute` makes them. A complete
record under a chunk's key means that the chunk is done. So no journal is needed: a resumed run
makes the plan again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Self

from ragcache.core.indexing import check_ids
from ragcache.core.precompute import (
    BATCH_TOKENS,
    Batch,
    BatchBuilder,
    drive,
    missing_batches,
    missing_keys,
)
from ragcache.errors import ConfigError, ContextError, PromptError, SourceError
from ragcache.planning.flops import ModelShape
from ragcache.store.format.codecs import expected_bytes
from ragcache.store.key import ChunkKey
from ragcache.util.list_argument import require_list

if TYPE_CHECKING:
    from ragcache.core.indexing import Step
    from ragcache.rag import RagCache
    from ragcache.types import Document, StageProgress, Tokens

__all__ = ["PrecomputePlan", "Shard", "WorkSize", "iter_plan", "make_plan"]

_YIELD_EVERY = 64  # chunks that are split between two steps


@dataclass(frozen=True, slots=True)
class Shard:
    """Every ``of``-th batch, beginning with the ``number``-th, counted from 1.

    Raises ConfigError unless 1 <= ``number`` <= ``of``.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"shard {self} is invalid: give i/n with i from 1 to n")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a shard such as ``2/8``. Raises ConfigError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise ConfigError(f"shard {text!r} is invalid: give i/n, such as 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, slots=True)
class WorkSize:
    """A number of chunks, and their size and cost."""

    chunks: int = 0
    tokens: int = 0
    payload_bytes: int = 0  # as stored; an upper bound if the codec's sizes depend on the values
    flops: float = 0.0  # to compute the KV, and again for the sensitivity

    def __add__(self, other: WorkSize) -> WorkSize:
        return WorkSize(
            self.chunks + other.chunks,
            self.tokens + other.tokens,
            self.payload_bytes + other.payload_bytes,
            self.flops + other.flops,
        )

    def __sub__(self, other: WorkSize) -> WorkSize:
        return WorkSize(
            self.chunks - other.chunks,
            self.tokens - other.tokens,
            self.payload_bytes - other.payload_bytes,
            self.flops - other.flops,
        )


@dataclass(frozen=True, slots=True)
class _SkippedDocument:
    """A document that was left out, and why."""

    document: str
    why: str


@dataclass(frozen=True, slots=True)
class PrecomputePlan:
    """The work of a shard. A chunk that occurs in several documents counts once."""

    documents: int  # number of documents that were read
    wanted: WorkSize  # of all chunks
    missing: WorkSize  # of those that are not stored
    skipped: tuple[_SkippedDocument, ...]
    shard: Shard
    estimator: _SizeEstimator = field(repr=False)
    _batches: tuple[_Packed, ...] = field(repr=False)

    @property
    def stored(self) -> WorkSize:
        """The chunks that were stored when the plan was made."""
        return self.wanted - self.missing

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches that have missing chunks, in the order in which they are computed."""
        return (packed.batch for packed in self._batches)


@dataclass(frozen=True, slots=True)
class _SizeEstimator:
    """Computes sizes and costs of chunks, encoded after their contexts."""

    model: ModelShape

    def __call__(self, key: ChunkKey) -> WorkSize:
        n, spec = len(key.tokens), self.model.spec
        size = round(expected_bytes(key.codec, spec, n))
        return WorkSize(1, n, size, 2 * self.model.flops(n, len(key.context)))

    def of(self, batch: Batch) -> WorkSize:
        """The size of a batch."""
        return sum(map(self, batch.keys), WorkSize())


@dataclass(frozen=True, slots=True)
class _Packed:
    """A batch at 4 bytes per token, so that a plan of a million chunks fits in memory."""

    context: Tokens
    like: ChunkKey  # of all chunks, without tokens
    tokens: tuple[array[int], ...]

    @classmethod
    def of(cls, batch: Batch) -> Self:
        like = replace(batch.keys[0], tokens=())
        return cls(batch.context, like, tuple(array("I", key.tokens) for key in batch.keys))

    @property
    def batch(self) -> Batch:
        keys = (replace(self.like, tokens=tuple(tokens)) for tokens in self.tokens)
        return Batch(self.context, tuple(keys))


def make_plan(
    cache: RagCache,
    documents: Iterable[Document],
    *,
    shard: Shard = Shard(),
    batch_tokens: int = BATCH_TOKENS,
    progress: StageProgress | None = None,
) -> PrecomputePlan:
    """Read and split ``documents`` as ``cache`` does, and find the chunks without stored KV.

    A document that cannot be split, or has a chunk longer than the model's context, is skipped.
    Nothing is computed or stored.
    """
    steps = iter_plan(cache, documents, shard=shard, batch_tokens=batch_tokens)
    return drive(steps, progress)


def iter_plan(
    cache: RagCache,
    documents: Iterable[Document],
    *,
    shard: Shard = Shard(),
    batch_tokens: int = BATCH_TOKENS,
) -> Generator[Step, None, PrecomputePlan]:
    """As :func:`make_plan`, as a generator of progress: the documents read so far, twice."""
    given = require_list(documents, "documents")
    engine, reader = cache.engine, _ChunkReader(cache)
    estimator = _SizeEstimator(ModelShape(engine.spec, engine.parameters, engine.heads))
    shard_batches, wanted, number = list[_Packed](), WorkSize(), 0
    for batch in reader.batches(given, batch_tokens):
        if batch is not None:
            number += 1
            if number % shard.of == shard.number % shard.of:
                shard_batches.append(_Packed.of(batch))
                wanted += estimator.of(batch)
        yield "plan", reader.documents, reader.documents
    due = missing_batches(
        (packed.batch for packed in shard_batches),
        partial(missing_keys, cache.chunks),
        batch_tokens=batch_tokens,
    )
    missing, packed = WorkSize(), list[_Packed]()
    for batch in due:
        missing += estimator.of(batch)
        packed.append(_Packed.of(batch))
        yield "plan", reader.documents, reader.documents
    return PrecomputePlan(
        reader.documents, wanted, missing, tuple(reader.skipped), shard, estimator, tuple(packed)
    )


class _ChunkReader:
    """Makes batches of documents' chunks, each chunk once, and collects skipped documents."""

    def __init__(self, cache: RagCache) -> None:
        self.cache = cache
        self.documents = 0
        self.skipped: list[_SkippedDocument] = []

    def batches(self, documents: Iterable[Document], batch_tokens: int) -> Iterator[Batch | None]:
        """All batches, the first of which contains the prompt's prefix.

        Yields None after every :data:`_YIELD_EVERY` chunks, so that other work can be done.
        """
        filling, seen = BatchBuilder(batch_tokens), set[bytes]()
        for document in documents:
            self.documents += 1
            found = list[ChunkKey]()
            try:
                for key in self._keys(document):
                    found.append(key)
                    if len(found) % _YIELD_EVERY == 0:
                        yield None
            except (ConfigError, PromptError, SourceError) as error:
                self.skipped.append(_SkippedDocument(document.id, str(error)))
                continue
            if found and not seen and self.cache.indexing.prefix_key.tokens:
                found = [self.cache.indexing.prefix_key, *found]
            for key in found:
                if key.digest not in seen:
                    seen.add(key.digest)
                    if (full := filling.add(key.context, key)) is not None:
                        yield full
        yield from filling.rest()

    def _keys(self, document: Document) -> Iterator[ChunkKey]:
        check_ids([document.id])
        for chunk in self.cache.indexing.cut(document):
            key = self.cache.indexing.key(chunk)
            need, have = len(key.context) + len(key.tokens), self.cache.engine.context_tokens
            if need > have:
                raise ContextError(
                    f"chunk {chunk.id} needs {need} tokens with the tokens before it, but the "
                    f"context is {have}: split it"
                )
            yield key
