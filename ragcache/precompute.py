"""The batch job: compute the KV of chunks that are not stored yet, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ragcache.blend.base import Layout
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import fuse
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.sensitivity import measured
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.store.reader import LayerReader
from ragcache.types import ChunkKV, ChunkNotes, Prompt, Tokens

T = TypeVar("T")
Progress = Callable[[int, int], None]  # done, total
MOST_VARIANTS = 5  # kept of one chunk, as in Cache-Craft's paper


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
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Precomputed:
    """Encode and store every chunk of ``keys`` that is not stored, with its sensitivity.

    ``company`` gives the tokens that stand between ``key.behind`` and a chunk (compile mode
    enriched), which its key does not name.
    A chunk is durable as soon as it is put, so a run that is killed has lost at most one batch
    (``batch_tokens`` tokens, or a longer chunk) and the next run does only what is missing.
    """
    steps = precomputing(engine, store, keys, company=company, batch_tokens=batch_tokens)
    return through(steps, progress)


def through(steps: Generator[tuple[Any, ...], None, T], told: Callable[..., None] | None) -> T:
    """Take all ``steps`` and tell of each; what they return."""
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
    batch_tokens: int = 2048,
) -> Generator[tuple[int, int], None, Precomputed]:
    """As :func:`precompute`, a batch at a time: (done, total) at the start and after each.

    What others have stored between two batches is not computed again.
    """
    began = time.perf_counter()
    wanted = {key.digest: key for key in keys}
    missing = [key for key in wanted.values() if not store.has(key)]
    done = encoded = tokens = 0
    yield 0, len(missing)
    for behind, batch in _batches(missing, company, batch_tokens):
        if due := [key for key in batch if not store.has(key)]:
            alone = engine.encode([key.tokens for key in due], behind=behind)
            for key, kv in zip(due, measured(engine, alone, behind), strict=True):
                store.put(key, kv)
                tokens += len(key.tokens)
            encoded += len(due)
        done += len(batch)
        yield done, len(missing)
    return Precomputed(
        encoded=encoded,
        stored=len(wanted) - encoded,
        tokens=tokens,
        payload_bytes=engine.spec.chunk_bytes(tokens),
        seconds=time.perf_counter() - began,
    )


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


def _batches(
    keys: Sequence[ChunkKey], company: Callable[[ChunkKey], Tokens], batch_tokens: int
) -> Iterator[tuple[Tokens, list[ChunkKey]]]:
    """Chunks behind the same tokens, in order: at most ``batch_tokens`` tokens, or one chunk."""
    together: dict[Tokens, list[ChunkKey]] = {}
    for key in keys:
        together.setdefault(key.behind + company(key), []).append(key)
    for behind, group in together.items():
        batch: list[ChunkKey] = []
        size = 0
        for key in group:
            if batch and size + len(key.tokens) > batch_tokens:
                yield behind, batch
                batch, size = [], 0
            batch.append(key)
            size += len(key.tokens)
        yield behind, batch
