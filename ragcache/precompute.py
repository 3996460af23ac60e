"""The batch job: compute the KV of chunks that are not stored yet, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ragcache.engine.base import Engine
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True)
class Precomputed:
    """What a run did. ``stored`` chunks were there before and were left alone."""

    encoded: int
    stored: int
    tokens: int  # encoded, without the tokens they were computed behind
    payload_bytes: int
    seconds: float


def precompute(
    engine: Engine,
    store: ChunkStore,
    keys: Iterable[ChunkKey],
    *,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Precomputed:
    """Encode and store every chunk of ``keys`` that is not stored.

    A chunk is durable as soon as it is put, so a run that is killed has lost at most one batch
    (``batch_tokens`` tokens, padding included) and the next run does only what is missing.
    """
    began = time.perf_counter()
    wanted = {key.digest: key for key in keys}
    missing = [key for key in wanted.values() if not store.has(key)]
    done = tokens = 0
    if progress is not None:
        progress(0, len(missing))
    for batch in _batches(missing, batch_tokens):
        encoded = engine.encode([key.tokens for key in batch], behind=batch[0].behind)
        for key, kv in zip(batch, encoded, strict=True):
            store.put(key, kv)
            tokens += len(key.tokens)
        done += len(batch)
        if progress is not None:
            progress(done, len(missing))
    return Precomputed(
        encoded=done,
        stored=len(wanted) - done,
        tokens=tokens,
        payload_bytes=engine.spec.chunk_bytes(tokens),
        seconds=time.perf_counter() - began,
    )


def _batches(keys: Sequence[ChunkKey], batch_tokens: int) -> Iterator[list[ChunkKey]]:
    """Chunks behind the same tokens, of like length, at most ``batch_tokens`` padded tokens."""
    batch: list[ChunkKey] = []
    for key in sorted(keys, key=lambda k: (k.behind, len(k.tokens), k.digest)):
        width = len(key.behind) + len(key.tokens)
        full = batch and (len(batch) + 1) * width > batch_tokens
        if full or (batch and batch[0].behind != key.behind):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
