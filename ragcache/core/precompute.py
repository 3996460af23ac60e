"""Computing the KV of chunks that are not stored yet, a batch at a time, and storing it.

The last bits of a chunk's KV depend on what is computed with it in one forward. So a batch follows
from what is wanted and never from what is there already, and is stored in one commit: a run that is
killed, and one that goes on after it, make the very batches of a run that nobody disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from ragcache.blend.base import Layout
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import fuse
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.store.base import ChunkStore, Miss
from ragcache.store.format.codecs import codec
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.store.prefetch import LayerReader
from ragcache.types import ChunkKV, ChunkNotes, Progress, Prompt, Tokens

T = TypeVar("T")
Counted = Callable[[int, int], None]  # tokens done, of how many
BATCH_TOKENS = 2048  # of chunks, computed at a time
MOST_VARIANTS = 5  # kept of one chunk, as in Cache-Craft's paper


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that one forward computes, one after another, all behind the same tokens."""

    behind: Tokens
    keys: tuple[ChunkKey, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return sum(len(key.tokens) for key in self.keys)


@dataclass(frozen=True, slots=True)
class Precomputed:
    """What a run did. ``stored`` chunks were there before and were left alone."""

    encoded: int
    stored: int
    tokens: int  # encoded, without the tokens they were computed behind
    payload_bytes: int
    seconds: float


def precompute(
    engine: ChunkEngine,
    store: ChunkStore,
    keys: Iterable[ChunkKey],
    *,
    company: Callable[[ChunkKey], Tokens] = lambda _: (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Precomputed:
    """Encode and store every chunk of ``keys`` that is not stored, with its sensitivity. One that
    is stored without it is encoded anew.

    ``company`` gives the tokens that stand between ``key.behind`` and a chunk (compile mode
    enriched), which its key does not name.
    A batch is durable as soon as it is put, so a run that is killed has lost at most one
    (``batch_tokens`` tokens, or a longer chunk) and the next run does only what is missing.
    """
    steps = precomputing(engine, store, keys, company=company, batch_tokens=batch_tokens)
    return drive(steps, progress)


def drive(steps: Generator[tuple[Any, ...], None, T], told: Callable[..., None] | None) -> T:
    """Take all ``steps``, tell ``told`` of each, and return what they return."""
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return cast(T, end.value)
        if told is not None:
            told(*done)


def precomputing(
    engine: ChunkEngine,
    store: ChunkStore,
    keys: Iterable[ChunkKey],
    *,
    company: Callable[[ChunkKey], Tokens] = lambda _: (),
    batch_tokens: int = BATCH_TOKENS,
    tokens: Counted | None = None,
) -> Generator[tuple[int, int], None, Precomputed]:
    """As :func:`precompute`, a batch at a time: (done, total) chunks at the start and after each;
    ``tokens`` is told the same of their tokens, before that.

    What others have stored between two batches is not computed again.
    """
    began = time.perf_counter()
    wanted = {key.digest: key for key in keys}
    missing = {key.digest for key in incomplete(store, list(wanted.values()))}
    due_tokens = sum(len(key.tokens) for digest, key in wanted.items() if digest in missing)
    done = done_tokens = encoded = encoded_tokens = 0
    count = tokens or (lambda *_: None)
    count(0, due_tokens)
    yield 0, len(missing)
    placed = ((key.behind + company(key), key) for key in wanted.values())
    every = batches(placed, batch_tokens=batch_tokens)

    def missing_of(some: Sequence[ChunkKey]) -> list[ChunkKey]:
        return [key for key in some if key.digest in missing]

    for batch in lacking(every, missing_of, batch_tokens=batch_tokens):
        for due in unless_stored(store, [batch]):
            store.put_all(zip(due.keys, compute(engine, due), strict=True))
            encoded, encoded_tokens = encoded + len(due), encoded_tokens + due.tokens
        done, done_tokens = done + len(batch), done_tokens + batch.tokens
        count(done_tokens, due_tokens)
        yield done, len(missing)
    return Precomputed(
        encoded=encoded,
        stored=len(wanted) - encoded,
        tokens=encoded_tokens,
        payload_bytes=round(bytes_per_token(engine) * encoded_tokens),
        seconds=time.perf_counter() - began,
    )


def bytes_per_token(engine: ChunkEngine, name: str = "") -> float:
    """What a token's KV takes in the engine's codec, or in that of a name; of one whose sizes
    depend on the values, as the engine has it."""
    own = dict(engine.fingerprint.fields).get("codec", "raw")
    layer = codec(name or own).layer_bytes(engine.spec, 1000)
    return engine.spec.chunk_bytes(1) if layer is None else engine.spec.layers * layer / 1000


class Filling:
    """Chunks behind the same tokens, in order, as batches of at most ``batch_tokens`` tokens, or of
    one chunk."""

    def __init__(self, batch_tokens: int = BATCH_TOKENS) -> None:
        self._most = batch_tokens
        self._filling: dict[Tokens, list[ChunkKey]] = {}
        self._sizes: dict[Tokens, int] = {}

    def add(self, behind: Tokens, key: ChunkKey) -> Batch | None:
        """The batch of those before, where this one would be too much for it."""
        keys, size = self._filling.setdefault(behind, []), self._sizes.get(behind, 0)
        full = None
        if keys and size + len(key.tokens) > self._most:
            full = Batch(behind, tuple(keys))
            keys.clear()
            size = 0
        keys.append(key)
        self._sizes[behind] = size + len(key.tokens)
        return full

    def rest(self) -> Iterator[Batch]:
        for behind, keys in self._filling.items():
            yield Batch(behind, tuple(keys))


def batches(
    keys: Iterable[tuple[Tokens, ChunkKey]], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Batch]:
    """All of them. ``keys`` come with the tokens that they are computed behind."""
    filling = Filling(batch_tokens)
    for behind, key in keys:
        if (full := filling.add(behind, key)) is not None:
            yield full
    yield from filling.rest()


def lacking(
    every: Iterable[Batch],
    missing_of: Callable[[Sequence[ChunkKey]], Sequence[ChunkKey]],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Batch]:
    """Batches of what is missing: first those of which nothing is stored, as they are, then what
    the others lack.

    That rest is packed anew: of a corpus in which a chunk here and there has changed, a forward for
    every such chunk would cost many times as much. ``missing_of`` gives those of some keys that are
    not stored, in order; it is asked once for each batch.
    """
    rest: list[tuple[Tokens, ChunkKey]] = []
    for batch in every:
        missing = missing_of(batch.keys)
        if len(missing) == len(batch):
            yield batch
        else:
            rest += [(batch.behind, key) for key in missing]
    yield from batches(rest, batch_tokens=batch_tokens)


def incomplete(store: ChunkStore, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
    """Those that are not stored, or not with their sensitivity, in order."""
    found = zip(keys, store.peek_all(keys), strict=True)
    return [key for key, one in found if isinstance(one, Miss) or not one.sensitivity]


def unless_stored(store: ChunkStore, every: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without what is stored by the time that they are asked for; none that is empty."""
    for batch in every:
        if due := incomplete(store, batch.keys):
            yield replace(batch, keys=tuple(due))


def compute(engine: ChunkEngine, batch: Batch) -> list[ChunkKV]:
    """The KV of every chunk of a batch, as it is stored: before RoPE, with its sensitivity."""
    alone = engine.encode([key.tokens for key in batch.keys], behind=batch.behind)
    return measure_sensitivity(engine, alone, batch.behind)


def keep_variants(
    engine: Engine, store: ChunkStore, prompt: Prompt, wanted: Iterable[int], tenant: str = ""
) -> list[ChunkKey]:
    """Prefill ``prompt`` in full and keep the chunks numbered ``wanted`` as variants.

    A variant is the KV of a chunk as it came to stand there, with notes on how it attended to the
    chunks before it: what Cache-Craft serves. Returns their keys.
    """
    chosen = sorted(wanted)
    rows = tuple(range(len(prompt)))
    names = tuple(map(digest_tokens, prompt.chunks))
    layout = Layout(prompt, (False,) * len(names), False, rows, (), names)
    with LayerReader(store, ()) as nothing:
        fused = fuse(engine, CacheCraft(), layout, nothing, capture=chosen)
    starts = [prompt.spans[number][0] for number in chosen]
    keys = [
        variant_key(engine.fingerprint, prompt.chunks[number], prompt.tokens[:start], tenant)
        for number, start in zip(chosen, starts, strict=True)
    ]
    for key, kv, notes in zip(keys, fused.captured, fused.notes, strict=True):
        keep(store, key, kv, notes)
    return keys


def keep(store: ChunkStore, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None) -> None:
    """Put KV that was cut from a prompt. With notes it is a variant: where a chunk has
    MOST_VARIANTS of them, those that have been worth least make room."""
    if notes is not None:
        kept = sorted(store.variants(key), key=lambda variant: variant.score)
        for variant in kept[: max(0, len(kept) - MOST_VARIANTS + 1)]:
            store.delete(variant.stored.key)
    store.put(key, kv, notes)
