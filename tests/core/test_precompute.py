"""Precomputing: only missing chunks, complete chunks, bounded batches."""

from __future__ import annotations

import pytest

from ragcache.core.precompute import Batch, make_batches, missing_batches, precompute
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from tests import models
from tests.store.samples import same


def test_stored_kv_is_what_encode_gives() -> None:
    import torch

    engine, store = models.engine("llama"), MemoryStore()
    chunks = [tuple(range(5, 5 + n)) for n in (4, 9, 2)]
    keys = [ChunkKey(engine.fingerprint, chunk, (1, 2, 3)) for chunk in chunks]
    seen: list[tuple[int, int]] = []
    done = precompute(engine, store, keys, progress=lambda n, total: seen.append((n, total)))
    assert (done.encoded, done.stored, done.tokens) == (3, 0, 15)
    assert seen[0] == (0, 3) and seen[-1] == (3, 3)
    for key in keys:
        kv, want = store.get(key), engine.encode([key.tokens], context=key.context)[0]
        for got, expected in zip(kv.keys + kv.values, want.keys + want.values, strict=True):  # type: ignore[union-attr]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_killed_run_is_taken_up_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store = models.engine("llama"), MemoryStore()
    keys = [ChunkKey(engine.fingerprint, (i, i + 1, i + 2), (1,)) for i in range(3, 13)]
    encode = engine.encode
    calls: list[int] = []

    def dies(chunks: list[tuple[int, ...]], **options: object) -> object:
        if len(calls) == 4:  # two for every batch: alone, and after the passage
            raise KeyboardInterrupt
        calls.append(len(chunks))
        return encode(chunks, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        precompute(engine, store, keys, batch_tokens=12)
    stored = store.stats().chunks
    assert stored == sum(calls) / 2 == 8
    monkeypatch.setattr(engine, "encode", encode)
    done = precompute(engine, store, keys)
    assert (done.encoded, done.stored) == (2, 8)


def test_repeated_chunks_are_computed_once() -> None:
    engine, store = models.engine("llama"), MemoryStore()
    key = ChunkKey(engine.fingerprint, (5, 6, 7))
    assert precompute(engine, store, [key, key, key]).encoded == 1


def test_batches_are_filled_in_order_behind_the_same_tokens() -> None:
    fingerprint = models.engine("llama").fingerprint
    keys = [ChunkKey(fingerprint, tuple(range(n)), b) for n in (3, 50, 4, 57) for b in ((), (1, 2))]
    behind = [key.context + ((7,) if len(key.tokens) == 50 else ()) for key in keys]
    made = list(make_batches(zip(behind, keys, strict=True), batch_tokens=61))
    assert [(b.context, [len(key.tokens) for key in b.keys]) for b in made] == [
        ((), [3, 4]),
        ((1, 2), [3, 4]),
        ((), [57]),
        ((1, 2), [57]),
        ((7,), [50]),
        ((1, 2, 7), [50]),
    ]
    assert {key for batch in made for key in batch.keys} == set(keys)
    long = ChunkKey(fingerprint, tuple(range(500)))
    assert list(make_batches([((), long)], batch_tokens=100)) == [
        Batch((), (long,))
    ]  # however long


def test_what_is_missing_is_whole_batches_and_then_the_rest_packed_anew() -> None:
    fingerprint = models.engine("llama").fingerprint
    keys = [ChunkKey(fingerprint, (n, n + 1, n + 2), (1,)) for n in range(12)]
    every = list(make_batches([((1, 9), key) for key in keys], batch_tokens=9))
    assert [len(batch) for batch in every] == [3, 3, 3, 3]
    stored = {keys[0], keys[4], *keys[6:9]}
    left = list(
        missing_batches(
            every, lambda keys: [key for key in keys if key not in stored], batch_tokens=9
        )
    )
    assert left == [every[3], Batch((1, 9), (keys[1], keys[2], keys[3])), Batch((1, 9), (keys[5],))]


def test_batches_do_not_depend_on_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run that is resumed after a kill stores the same bits as an uninterrupted one."""
    engine = models.engine("llama")
    keys = [ChunkKey(engine.fingerprint, tuple(range(i, i + 2 + i % 7)), (1,)) for i in range(30)]
    whole, halved = MemoryStore(), MemoryStore()
    precompute(engine, whole, keys, batch_tokens=16)
    put_all = halved.put_all

    def full(chunks: object) -> None:
        if halved.stats().chunks > 10:
            raise KeyboardInterrupt
        put_all(chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(halved, "put_all", full)
    with pytest.raises(KeyboardInterrupt):
        precompute(engine, halved, keys, batch_tokens=16)
    monkeypatch.setattr(halved, "put_all", put_all)
    stored = halved.stats().chunks
    done = precompute(engine, halved, keys, batch_tokens=16)
    assert 0 < stored == done.stored < len(keys)
    assert all(same(whole.get(key), halved.get(key)) for key in keys)
