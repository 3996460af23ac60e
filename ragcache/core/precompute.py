"""Compute and store the KV of chunks that are not stored yet, in batches.

The last bits of a chunk's KV depend on which chunks are computed in the same forward pass. So
batches depend only on the requested keys, never on what is stored, and each is stored in one
commit: a run that is killed and resumed stores the same bits as one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from ragcache.blend.base import Layout
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import fuse
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.store.base import ChunkStore, Miss
from ragcache.store.format.codecs import expected_bytes
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.store.prefetch import LayerReader
from ragcache.types import ChunkKV, ChunkNotes, Progress, Prompt, Tokens

__all__ = [
    "BATCH_TOKENS",
    "Batch",
    "BatchBuilder",
    "Precomputed",
    "Steps",
    "TokenProgress",
    "bytes_per_token",
    "compute_batch",
    "drive",
    "iter_precompute",
    "missing_batches",
    "missing_keys",
    "precompute",
    "skip_stored",
    "store_variants",
]

_T = TypeVar("_T")
_Step = TypeVar("_Step")
TokenProgress = Callable[[int, int], None]  # called with (done, total) tokens
BATCH_TOKENS = 2048  # maximum tokens of the chunks of a batch
MAX_VARIANTS = 5  # stored variants of one chunk, as in Cache-Craft's paper


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that one forward computes independently of each other, all after ``context``."""

    context: Tokens
    keys: tuple[ChunkKey, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return sum(len(key.tokens) for key in self.keys)


@dataclass(frozen=True, slots=True)
class Precomputed:
    """The result of a run."""

    encoded: int  # chunks that were computed
    stored: int  # chunks that were stored before, and not computed again
    tokens: int  # of the computed chunks, without those of their context
    payload_bytes: int  # of the computed chunks, by :func:`bytes_per_token`
    seconds: float

    def __add__(self, other: Precomputed) -> Precomputed:
        return Precomputed(
            self.encoded + other.encoded,
            self.stored + other.stored,
            self.tokens + other.tokens,
            self.payload_bytes + other.payload_bytes,
            self.seconds + other.seconds,
        )


def precompute(
    engine: ChunkEngine,
    store: ChunkStore,
    keys: Iterable[ChunkKey],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Precomputed:
    """Encode and store every chunk of ``keys`` that is not stored with its sensitivity.

    A batch is durable as soon as it is put: a run that is killed loses at most one
    (``batch_tokens`` tokens, or a longer chunk), and the next run computes only what is missing.
    ``progress`` is called with (done, total) chunks.
    """
    steps = iter_precompute(engine, store, keys, batch_tokens=batch_tokens)
    return drive(steps, progress)


class Steps(Generic[_Step, _T]):
    """Iterates over the steps of ``generator`` and keeps what it returns, in ``result``."""

    result: _T

    def __init__(self, generator: Generator[_Step, None, _T]) -> None:
        self._generator = generator

    def __iter__(self) -> Generator[_Step, None, None]:
        self.result = yield from self._generator


def drive(
    generator: Generator[tuple[Any, ...], None, _T], on_step: Callable[..., None] | None
) -> _T:
    """Run ``generator`` to its end, call ``on_step`` with each step, and return what it returns."""
    steps = Steps(generator)
    for step in steps:
        if on_step is not None:
            on_step(*step)
    return steps.result


def iter_precompute(
    engine: ChunkEngine,
    store: ChunkStore,
    keys: Iterable[ChunkKey],
    *,
    batch_tokens: int = BATCH_TOKENS,
    tokens: TokenProgress | None = None,
) -> Generator[tuple[int, int], None, Precomputed]:
    """As :func:`precompute`, a batch at a time: yields (done, total) chunks at the start and after
    each batch. ``tokens`` is called with (done, total) tokens just before.

    Chunks that were stored by others since the start are not computed again.
    """
    began = time.perf_counter()
    wanted = {key.digest: key for key in keys}
    placed = ((key.context, key) for key in wanted.values())
    every = make_batches(placed, batch_tokens=batch_tokens)
    due = list(missing_batches(every, partial(missing_keys, store), batch_tokens=batch_tokens))
    total, total_tokens = sum(map(len, due)), sum(batch.tokens for batch in due)
    done = done_tokens = encoded = encoded_tokens = 0
    count = tokens or (lambda *_: None)
    count(0, total_tokens)
    yield 0, total
    for batch in due:
        for left in skip_stored(store, [batch]):
            store.put_all(zip(left.keys, compute_batch(engine, left), strict=True))
            encoded, encoded_tokens = encoded + len(left), encoded_tokens + left.tokens
        done, done_tokens = done + len(batch), done_tokens + batch.tokens
        count(done_tokens, total_tokens)
        yield done, total
    return Precomputed(
        encoded=encoded,
        stored=len(wanted) - encoded,
        tokens=encoded_tokens,
        payload_bytes=round(bytes_per_token(engine) * encoded_tokens),
        seconds=time.perf_counter() - began,
    )


def bytes_per_token(engine: ChunkEngine, name: str = "") -> float:
    """Bytes of a token's KV in the codec called ``name``, by default the engine's: an estimate
    where they depend on the values."""
    return expected_bytes(name or engine.fingerprint.codec, engine.spec, 1000) / 1000


class BatchBuilder:
    """Groups chunks with the same context, in order, into batches of at most ``batch_tokens``
    tokens, or of one longer chunk."""

    def __init__(self, batch_tokens: int = BATCH_TOKENS) -> None:
        self._most = batch_tokens
        self._filling: dict[Tokens, list[ChunkKey]] = {}
        self._sizes: dict[Tokens, int] = {}

    def add(self, context: Tokens, key: ChunkKey) -> Batch | None:
        """Add a chunk. Returns the batch before it, if the chunk no longer fits into that one."""
        keys, size = self._filling.setdefault(context, []), self._sizes.get(context, 0)
        full = None
        if keys and size + len(key.tokens) > self._most:
            full = Batch(context, tuple(keys))
            keys.clear()
            size = 0
        keys.append(key)
        self._sizes[context] = size + len(key.tokens)
        return full

    def rest(self) -> Iterator[Batch]:
        """The batches that are not full, to be called after the last :meth:`add`."""
        for context, keys in self._filling.items():
            yield Batch(context, tuple(keys))


def make_batches(
    keys: Iterable[tuple[Tokens, ChunkKey]], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Batch]:
    """The batches of ``keys``, each given with the context that its chunk is computed after."""
    filling = BatchBuilder(batch_tokens)
    for context, key in keys:
        if (full := filling.add(context, key)) is not None:
            yield full
    yield from filling.rest()


def missing_batches(
    every: Iterable[Batch],
    missing_of: Callable[[Sequence[ChunkKey]], Sequence[ChunkKey]],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Batch]:
    """Batches of the missing chunks: first the batches of which nothing is stored, unchanged, then
    new batches of the missing chunks of all others.

    Without new batches, a corpus in which a few chunks have changed would take a forward for each
    of them, which costs many times as much. ``missing_of`` returns the keys that are not stored, in
    order; it is called once for each batch.
    """
    rest: list[tuple[Tokens, ChunkKey]] = []
    for batch in every:
        missing = missing_of(batch.keys)
        if len(missing) == len(batch):
            yield batch
        else:
            rest += [(batch.context, key) for key in missing]
    yield from make_batches(rest, batch_tokens=batch_tokens)


def missing_keys(store: ChunkStore, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
    """The keys that are not stored, or not with their sensitivity, in order."""
    found = zip(keys, store.get_headers(keys, count=False), strict=True)
    return [key for key, one in found if isinstance(one, Miss) or not one.sensitivity]


def skip_stored(store: ChunkStore, every: Iterable[Batch]) -> Iterator[Batch]:
    """The batches without chunks that are stored by the time a batch is reached; empty batches are
    left out."""
    for batch in every:
        if due := missing_keys(store, batch.keys):
            yield replace(batch, keys=tuple(due))


def compute_batch(engine: ChunkEngine, batch: Batch) -> list[ChunkKV]:
    """The KV of every chunk of a batch, as it is stored: before RoPE, with its sensitivity."""
    alone = engine.encode([key.tokens for key in batch.keys], context=batch.context)
    return measure_sensitivity(engine, alone, batch.context)


def store_variants(
    engine: Engine, store: ChunkStore, prompt: Prompt, wanted: Iterable[int], tenant: str = ""
) -> list[ChunkKey]:
    """Prefill ``prompt`` in full and store the chunks numbered ``wanted`` as variants.

    A variant is the KV of a chunk as computed in that prompt, with notes on how it attended to the
    chunks before it (see :class:`ragcache.blend.cachecraft.CacheCraft`). Returns their keys.
    """
    chosen = sorted(wanted)
    rows = tuple(range(len(prompt)))
    names = tuple(map(digest_tokens, prompt.chunks))
    layout = Layout(prompt, (False,) * len(names), 0, rows, (), names)
    with LayerReader(store, ()) as nothing:
        fused = fuse(engine, CacheCraft(), layout, nothing, capture=chosen)
    starts = [prompt.spans[number][0] for number in chosen]
    keys = [
        variant_key(engine.fingerprint, prompt.chunks[number], prompt.tokens[:start], tenant)
        for number, start in zip(chosen, starts, strict=True)
    ]
    for key, kv, notes in zip(keys, fused.captured, fused.notes, strict=True):
        store_captured(store, key, kv, notes)
    return keys


def store_captured(store: ChunkStore, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None) -> None:
    """Store KV that was captured in a prompt. With notes it is a variant: where a chunk already has
    MAX_VARIANTS of them, those with the lowest scores are deleted."""
    if notes is None:
        store.put(key, kv)
        return
    kept = sorted(store.variants.find(key), key=lambda variant: variant.score)
    for variant in kept[: max(0, len(kept) - MAX_VARIANTS + 1)]:
        store.delete(variant.stored.key)
    store.variants.put(key, kv, notes)
