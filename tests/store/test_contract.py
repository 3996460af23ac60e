"""Every store against the one in memory: the same calls, the same values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ragcache.errors import StoreError
from ragcache.store import ChunkKey, ChunkStore, MemoryStore, Miss, StoredChunk
from ragcache.types import ChunkKV
from tests.store.conftest import STORES
from tests.store.samples import MODEL, OTHER, make_key, make_kv, same, unversioned

KEYS = [make_key(first) for first in range(4)]


def stored(key: ChunkKey, kv: ChunkKV) -> StoredChunk:
    sizes = (kv.spec.layer_bytes(5),) * len(kv.keys)
    return StoredChunk(key, kv.spec, len(kv.tokens), sizes, kv.sensitivity)


def fill(*stores: ChunkStore, seed: int = 0) -> None:
    for store in stores:
        for key in KEYS:
            store.put(key, make_kv(key, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(store: ChunkStore, reference: MemoryStore, dtype: torch.dtype) -> None:
    kv = make_kv(KEYS[0], dtype=dtype)
    for each in (store, reference):
        each.put(KEYS[0], kv)
    assert same(store.get(KEYS[0]), reference.get(KEYS[0]))
    assert same(store.get(KEYS[0]), kv)
    for each in (store, reference):
        assert unversioned(each.find(KEYS[0])) == stored(KEYS[0], kv)


def test_layers_are_those_that_were_put(store: ChunkStore, reference: MemoryStore) -> None:
    fill(store, reference)
    for key in KEYS:
        for layer in range(3):
            mine, theirs = store.layer(key, layer), reference.layer(key, layer)
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_put_replaces(store: ChunkStore, reference: MemoryStore) -> None:
    fill(store, reference)
    fill(store, reference, seed=1)
    assert all(same(store.get(key), make_kv(key, seed=1)) for key in KEYS)
    assert store.stats().chunks == 4
    assert store.stats().payload_bytes == reference.stats().payload_bytes


def test_every_put_is_another_version(store: ChunkStore) -> None:
    fill(store)
    first = store.find(KEYS[0])
    assert store.find(KEYS[0]) == first
    fill(store)
    assert store.find(KEYS[0]) != first and unversioned(store.find(KEYS[0])) == unversioned(first)


def test_a_peek_finds_and_counts_nothing(store: ChunkStore) -> None:
    fill(store)
    for key in (KEYS[0], make_key(50), replace(KEYS[0], fingerprint=OTHER)):
        seen = store.peek(key)
        assert (store.stats().hits, store.stats().misses.total()) == (0, 0)
        assert store.has(key) == isinstance(seen, StoredChunk)
    assert store.peek(KEYS[1]) == store.find(KEYS[1])


def test_all_at_once_is_one_by_one(store: ChunkStore) -> None:
    fill(store)
    keys = [KEYS[2], make_key(50), KEYS[0]]
    assert store.missing(keys) == [make_key(50)] and store.missing([]) == []
    assert store.find_all(keys) == [store.find(key) for key in keys]
    assert store.stats().hits == 4 and store.stats().misses == {"absent": 2}


def test_fewer_layers_leave_none_behind(store: ChunkStore) -> None:
    kv = make_kv(KEYS[0])
    store.put(KEYS[0], kv)
    store.put(KEYS[0], ChunkKV(kv.tokens, kv.keys[:1], kv.values[:1]))
    found = store.get(KEYS[0])
    assert isinstance(found, ChunkKV) and len(found.keys) == 1
    assert store.verify() == {}


def test_what_is_returned_is_the_callers_own(store: ChunkStore) -> None:
    kv = make_kv(KEYS[0])
    store.put(KEYS[0], kv)
    kv.keys[0].zero_()
    for tensor in store.layer(KEYS[0], 0):
        tensor.fill_(7)
    assert same(store.get(KEYS[0]), make_kv(KEYS[0]))


def test_delete(store: ChunkStore) -> None:
    fill(store)
    assert store.delete(KEYS[1]) and not store.delete(KEYS[1])
    assert not store.has(KEYS[1]) and store.has(KEYS[0])
    assert store.find(KEYS[1]) == Miss("absent", "these tokens are not stored")
    assert store.stats().chunks == 3 and store.verify() == {}


def test_keys_are_in_byte_order(store: ChunkStore, reference: MemoryStore) -> None:
    fill(store, reference)
    assert list(store.keys()) == list(reference.keys()) == sorted(key.digest for key in KEYS)


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        (replace(KEYS[0], fingerprint=OTHER), f"stored for {MODEL}, asked for {OTHER}"),
        (replace(KEYS[0], mode="context"), "stored in mode prefix, asked for mode context"),
        (replace(KEYS[0], context=(9,)), f"stored for {MODEL}, but behind another prefix"),
    ],
    ids=["model", "mode", "prefix"],
)
def test_the_same_tokens_made_otherwise_are_stale(
    store: ChunkStore, reference: MemoryStore, asked: ChunkKey, detail: str
) -> None:
    fill(store, reference)
    miss = store.find(asked)
    assert miss == reference.find(asked) == Miss("stale", f"these tokens are {detail}")
    assert same(store.get(asked), reference.get(asked))


def test_stale_names_the_same_record_in_every_store(
    store: ChunkStore, reference: MemoryStore
) -> None:
    for each in (store, reference):
        for behind in range(5):
            each.put(replace(KEYS[0], context=(behind,)), make_kv(KEYS[0]))
            each.put(replace(KEYS[0], context=(behind,), mode=f"m{behind}"), make_kv(KEYS[0]))
    asked = replace(KEYS[0], context=(9,))
    assert unversioned(store.find(asked)) == unversioned(reference.find(asked))


def test_stale_is_over_with_the_record(store: ChunkStore) -> None:
    store.put(KEYS[0], make_kv(KEYS[0]))
    store.delete(KEYS[0])
    miss = store.find(replace(KEYS[0], fingerprint=OTHER))
    assert isinstance(miss, Miss) and miss.reason == "absent"


def test_another_tenants_tokens_are_absent_not_stale(store: ChunkStore) -> None:
    fill(store)
    miss = store.find(replace(KEYS[0], tenant="other"))
    assert miss == Miss("absent", "these tokens are not stored")


def test_hits_and_misses_are_counted(store: ChunkStore, reference: MemoryStore) -> None:
    for each in (store, reference):
        fill(each)
        each.find(KEYS[0])
        each.get(KEYS[1])
        each.find(make_key(50))
        each.get(replace(KEYS[0], mode="context"))
        each.has(KEYS[0])
        with pytest.raises(StoreError):
            each.layer(make_key(50), 0)
    assert store.stats() == reference.stats()
    assert store.stats().hits == 2
    assert store.stats().misses == {"absent": 2, "stale": 1}


def test_stats_by_fingerprint(store: ChunkStore, reference: MemoryStore) -> None:
    for each in (store, reference):
        fill(each)
        each.put(replace(KEYS[0], fingerprint=OTHER), make_kv(KEYS[0]))
        each.delete(KEYS[3])
    assert store.stats() == reference.stats()
    assert store.stats().fingerprints == {str(MODEL): 3, str(OTHER): 1}
    assert store.stats().payload_bytes == 4 * make_kv(KEYS[0]).spec.chunk_bytes(5)


def test_a_layer_of_no_record_says_key_and_reason(store: ChunkStore) -> None:
    fill(store)
    asked = replace(KEYS[0], mode="context")
    with pytest.raises(StoreError, match="stored in mode prefix") as caught:
        store.layer(asked, 0)
    assert (caught.value.key, caught.value.reason) == (asked.digest, "stale")


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_no_chunk_has(store: ChunkStore, layer: int) -> None:
    fill(store)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        store.layer(KEYS[0], layer)


def test_kv_of_other_tokens_is_refused(store: ChunkStore) -> None:
    with pytest.raises(ValueError, match="does not belong"):
        store.put(KEYS[0], make_kv(KEYS[1]))
    assert not store.has(KEYS[0])


def test_a_closed_store_says_so(store: ChunkStore) -> None:
    fill(store)
    store.close()
    store.close()
    for call in (
        lambda: store.put(KEYS[0], make_kv(KEYS[0])),
        lambda: store.find(KEYS[0]),
        lambda: store.has(KEYS[0]),
        lambda: store.layer(KEYS[0], 0),
        lambda: store.get(KEYS[0]),
        lambda: store.delete(KEYS[0]),
        lambda: list(store.keys()),
        lambda: store.stats(),
        lambda: store.verify(),
    ):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_many_threads(store: ChunkStore) -> None:
    def work(first: int) -> bool:
        key = make_key(first % 8)
        store.put(key, make_kv(key))
        return same(store.get(key), make_kv(key))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(24)))
    assert store.stats().chunks == 8 and store.verify() == {}


@pytest.mark.parametrize("kind", sorted(STORES.keys() - {"memory"}))
def test_what_was_put_is_there_after_reopening(kind: str, tmp_path: Path) -> None:
    with STORES[kind](tmp_path) as store:
        fill(store)
        before = store.stats()
    with STORES[kind](tmp_path) as store:
        assert all(same(store.get(key), make_kv(key)) for key in KEYS)
        assert store.stats().fingerprints == before.fingerprints
        assert store.stats().payload_bytes == before.payload_bytes


def test_put_all_is_every_put(store: ChunkStore, reference: MemoryStore) -> None:
    fill(reference)
    store.put(KEYS[0], make_kv(KEYS[0], seed=1))
    store.put_all([(key, make_kv(key)) for key in KEYS])
    assert all(same(store.get(key), reference.get(key)) for key in KEYS)
    assert store.stats().payload_bytes == reference.stats().payload_bytes
    store.put_all([])
