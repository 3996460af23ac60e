"""What a corpus needs: its chunks, which of them are stored, and what the others will cost.

The unit of work is a batch of chunks, as :mod:`ragcache.core.precompute` makes them; a chunk's key
says what it is, and a complete record under it that it is done. So a plan needs no journal: it is
made anew by whoever goes on.
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
from ragcache.planning.flops import Model
from ragcache.store.format.codecs import codec
from ragcache.store.key import ChunkKey
from ragcache.util.several import several

if TYPE_CHECKING:
    from ragcache.core.indexing import Progress, Step
    from ragcache.rag import RagCache
    from ragcache.types import Document, Tokens

_CUT = 64  # chunks at a time


@dataclass(frozen=True, slots=True)
class Shard:
    """Every ``of``-th batch, from the ``number``-th on, which counts from 1."""

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"shard {self} cannot be: give i/n with i from 1 to n")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``2/8``. Raises ConfigError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise ConfigError(f"shard {text!r} cannot be: give i/n, such as 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, slots=True)
class Size:
    """Chunks, and what they are."""

    chunks: int = 0
    tokens: int = 0
    payload_bytes: int = 0  # as stored; of a codec whose sizes depend on the values: at most
    flops: float = 0.0  # to compute, alone and once more for the sensitivity

    def __add__(self, other: Size) -> Size:
        return Size(
            self.chunks + other.chunks,
            self.tokens + other.tokens,
            self.payload_bytes + other.payload_bytes,
            self.flops + other.flops,
        )

    def __sub__(self, other: Size) -> Size:
        return Size(
            self.chunks - other.chunks,
            self.tokens - other.tokens,
            self.payload_bytes - other.payload_bytes,
            self.flops - other.flops,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was left out, and why."""

    document: str
    why: str


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done of a shard. A chunk that several documents have is one."""

    documents: int  # that were read
    wanted: Size
    missing: Size
    skipped: tuple[Skipped, ...]
    shard: Shard
    measure: Measure = field(repr=False)
    _batches: tuple[_Packed, ...] = field(repr=False)

    @property
    def stored(self) -> Size:
        """What was there when the plan was made."""
        return self.wanted - self.missing

    @property
    def batches(self) -> Iterator[Batch]:
        """Those of which something is missing, in the order in which they are computed."""
        return (packed.batch for packed in self._batches)


@dataclass(frozen=True, slots=True)
class Measure:
    """What chunks of a model take, behind so many tokens."""

    model: Model
    behind: int

    def __call__(self, key: ChunkKey) -> Size:
        n, spec = len(key.tokens), self.model.spec
        layer = codec(key.codec).layer_bytes(spec, n)
        size = spec.chunk_bytes(n) if layer is None else spec.layers * layer
        return Size(1, n, size, 2 * self.model.flops(n, self.behind))

    def of(self, batch: Batch) -> Size:
        return sum(map(self, batch.keys), Size())


@dataclass(frozen=True, slots=True)
class _Packed:
    """A batch at 4 bytes a token: a plan of a million chunks fits in memory."""

    behind: Tokens
    like: ChunkKey  # without its tokens
    tokens: tuple[array[int], ...]

    @classmethod
    def of(cls, batch: Batch) -> Self:
        like = replace(batch.keys[0], tokens=())
        return cls(batch.behind, like, tuple(array("I", key.tokens) for key in batch.keys))

    @property
    def batch(self) -> Batch:
        keys = (replace(self.like, tokens=tuple(tokens)) for tokens in self.tokens)
        return Batch(self.behind, tuple(keys))


def plan(
    cache: RagCache,
    documents: Iterable[Document],
    *,
    shard: Shard = Shard(),
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Work:
    """Read ``documents``, split them as ``cache`` does, and see which chunks it has no KV of.

    A document that cannot be split, or has a chunk beyond the context, is skipped. Nothing is
    computed or stored. Raises ConfigError in a compile mode that needs more than the documents.
    """
    steps = planning(cache, documents, shard=shard, batch_tokens=batch_tokens)
    return drive(steps, progress)


def planning(
    cache: RagCache,
    documents: Iterable[Document],
    *,
    shard: Shard = Shard(),
    batch_tokens: int = BATCH_TOKENS,
) -> Generator[Step, None, Work]:
    """As :func:`plan`, in steps: how many documents have been read, of how many so far."""
    if cache.indexing.encoding.similar:
        raise ConfigError(
            f"encoding context {cache.indexing.encoding.mode} computes chunks behind similar ones "
            "of an index, and there is none here: use `ragcache index`"
        )
    given = several(documents, "documents")
    engine, reading = cache.engine, _Reading(cache)
    model = Model(engine.spec, engine.parameters, engine.heads)
    measure = Measure(model, len(cache.indexing.encoding.behind))
    mine, wanted, number = list[_Packed](), Size(), 0
    for batch in reading.batches(given, batch_tokens):
        if batch is not None:
            number += 1
            if number % shard.of == shard.number % shard.of:
                mine.append(_Packed.of(batch))
                wanted += measure.of(batch)
        yield "plan", reading.documents, reading.documents
    due = missing_batches(
        (packed.batch for packed in mine),
        partial(missing_keys, cache.chunks),
        batch_tokens=batch_tokens,
    )
    missing, packed = Size(), list[_Packed]()
    for batch in due:
        missing += measure.of(batch)
        packed.append(_Packed.of(batch))
        yield "plan", reading.documents, reading.documents
    return Work(
        reading.documents, wanted, missing, tuple(reading.skipped), shard, measure, tuple(packed)
    )


class _Reading:
    """Batches of documents' chunks, each chunk once, and what was skipped."""

    def __init__(self, cache: RagCache) -> None:
        self.cache = cache
        self.documents = 0
        self.skipped: list[Skipped] = []

    def batches(self, documents: Iterable[Document], batch_tokens: int) -> Iterator[Batch | None]:
        """All batches, the prompt's prefix in the first; None whenever so many chunks have been
        cut, between which is time for others."""
        filling, seen = BatchBuilder(batch_tokens), set[bytes]()
        for document in documents:
            self.documents += 1
            found = list[ChunkKey]()
            try:
                for key in self._of(document):
                    found.append(key)
                    if len(found) % _CUT == 0:
                        yield None
            except (ConfigError, PromptError, SourceError) as error:
                self.skipped.append(Skipped(document.id, str(error)))
                continue
            if found and not seen and self.cache.indexing.prefix_key.tokens:
                found = [self.cache.indexing.prefix_key, *found]
            for key in found:
                if key.digest not in seen:
                    seen.add(key.digest)
                    if (full := filling.add(key.behind, key)) is not None:
                        yield full
        yield from filling.rest()

    def _of(self, document: Document) -> Iterator[ChunkKey]:
        check_ids([document.id])
        for chunk in self.cache.indexing.cut(document):
            key = self.cache.indexing.key(chunk)
            need, have = len(key.behind) + len(key.tokens), self.cache.engine.context_tokens
            if need > have:
                raise ContextError(
                    f"chunk {chunk.id} needs {need} tokens with what it is computed behind, but "
                    f"the context is {have}: split it"
                )
            yield key
