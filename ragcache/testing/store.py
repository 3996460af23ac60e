"""Tests of the contract of a chunk store, against the store in memory, by value."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ragcache.errors import StoreError
from ragcache.store.base import ChunkStore, Miss, StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.testing.samples import LAYERS, MODEL, OTHER, make_key, make_kv, same, unversioned
from ragcache.types import ChunkKV

__all__ = ["ChunkStoreTests"]

KEYS = [make_key(first) for first in range(4)]


def _stored(key: ChunkKey, kv: ChunkKV) -> StoredChunk:
    sizes = (kv.spec.layer_bytes(5),) * len(kv.keys)
    return StoredChunk(key, kv.spec, len(kv.tokens), sizes, kv.sensitivity)


def _fill(*stores: ChunkStore, seed: int = 0) -> None:
    for store in stores:
        for key in KEYS:
            store.put(key, make_kv(key, seed))


def _found(store: ChunkStore, *keys: ChunkKey) -> list[StoredChunk]:
    found = [one for one in store.get_headers(keys) if isinstance(one, StoredChunk)]
    assert len(found) == len(keys)
    return found


class ChunkStoreTests:
    """Tests of a :class:`~ragcache.store.base.ChunkStore`.

    A subclass overrides :meth:`open`; :meth:`damage`, if the stored bytes can be changed from
    outside; and ``durable``, if nothing survives :meth:`~ragcache.store.base.ChunkStore.close`.
    """

    durable: ClassVar[bool] = True  # what was put is there when the store is opened again

    def open(self, path: Path) -> ChunkStore:
        """The store to test, in the directory ``path``: empty at first, opened again later."""
        raise NotImplementedError("return the store to test")

    def damage(self, store: ChunkStore, key: ChunkKey, layer: int) -> None:
        """Change stored bytes of one layer of a chunk without the store's knowledge."""
        pytest.skip("this store's bytes cannot be changed from outside")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ChunkStore]:
        """An empty store."""
        with self.open(tmp_path) as store:
            yield store

    @pytest.fixture
    def reference(self) -> Iterator[MemoryStore]:
        """The reference, which ``store`` has to equal after the same calls."""
        with MemoryStore() as store:
            yield store

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_round_trip(
        self, store: ChunkStore, reference: MemoryStore, dtype: torch.dtype
    ) -> None:
        kv = make_kv(KEYS[0], dtype=dtype)
        for each in (store, reference):
            each.put(KEYS[0], kv)
        assert same(store.get(KEYS[0]), reference.get(KEYS[0]))
        assert same(store.get(KEYS[0]), kv)
        for each in (store, reference):
            assert unversioned(each.get_header(KEYS[0])) == _stored(KEYS[0], kv)

    def test_layers_are_those_that_were_put(
        self, store: ChunkStore, reference: MemoryStore
    ) -> None:
        _fill(store, reference)
        for key in KEYS:
            for layer in range(3):
                mine, theirs = store.layer(key, layer), reference.layer(key, layer)
                assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])

    def test_put_replaces(self, store: ChunkStore, reference: MemoryStore) -> None:
        _fill(store, reference)
        _fill(store, reference, seed=1)
        assert all(same(store.get(key), make_kv(key, seed=1)) for key in KEYS)
        assert store.stats().chunks == 4
        assert store.stats().payload_bytes == reference.stats().payload_bytes

    def test_every_put_is_another_version(self, store: ChunkStore) -> None:
        _fill(store)
        first = store.get_header(KEYS[0])
        assert store.get_header(KEYS[0]) == first
        _fill(store)
        assert store.get_header(KEYS[0]) != first and unversioned(
            store.get_header(KEYS[0])
        ) == unversioned(first)

    def test_a_peek_finds_and_counts_nothing(self, store: ChunkStore) -> None:
        _fill(store)
        for key in (KEYS[0], make_key(50), replace(KEYS[0], fingerprint=OTHER)):
            seen = store.get_header(key, count=False)
            assert (store.stats().hits, store.stats().misses.total()) == (0, 0)
            assert store.has(key) == isinstance(seen, StoredChunk)
        assert store.get_header(KEYS[1], count=False) == store.get_header(KEYS[1])

    def test_all_at_once_is_one_by_one(self, store: ChunkStore) -> None:
        _fill(store)
        keys = [KEYS[2], make_key(50), KEYS[0]]
        assert store.missing(keys) == [make_key(50)] and store.missing([]) == []
        assert store.get_headers(keys) == [store.get_header(key) for key in keys]
        assert store.stats().hits == 4 and store.stats().misses == {"absent": 2}

    def test_fewer_layers_leave_none_behind(self, store: ChunkStore) -> None:
        kv = make_kv(KEYS[0])
        store.put(KEYS[0], kv)
        store.put(KEYS[0], ChunkKV(kv.tokens, kv.keys[:1], kv.values[:1]))
        found = store.get(KEYS[0])
        assert isinstance(found, ChunkKV) and len(found.keys) == 1
        assert store.verify() == {}

    def test_what_is_returned_is_the_callers_own(self, store: ChunkStore) -> None:
        kv = make_kv(KEYS[0])
        store.put(KEYS[0], kv)
        kv.keys[0].zero_()
        for tensor in store.layer(KEYS[0], 0):
            tensor.fill_(7)
        assert same(store.get(KEYS[0]), make_kv(KEYS[0]))

    def test_delete(self, store: ChunkStore) -> None:
        _fill(store)
        assert store.delete(KEYS[1]) and not store.delete(KEYS[1])
        assert not store.has(KEYS[1]) and store.has(KEYS[0])
        assert store.get_header(KEYS[1]) == Miss("absent", "these tokens are not stored")
        assert store.stats().chunks == 3 and store.verify() == {}

    def test_keys_are_in_byte_order(self, store: ChunkStore, reference: MemoryStore) -> None:
        _fill(store, reference)
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
        self, store: ChunkStore, reference: MemoryStore, asked: ChunkKey, detail: str
    ) -> None:
        _fill(store, reference)
        miss = store.get_header(asked)
        assert miss == reference.get_header(asked) == Miss("stale", f"these tokens are {detail}")
        assert same(store.get(asked), reference.get(asked))

    def test_stale_names_the_same_record_in_every_store(
        self, store: ChunkStore, reference: MemoryStore
    ) -> None:
        for each in (store, reference):
            for behind in range(5):
                each.put(replace(KEYS[0], context=(behind,)), make_kv(KEYS[0]))
                each.put(replace(KEYS[0], context=(behind,), mode=f"m{behind}"), make_kv(KEYS[0]))
        asked = replace(KEYS[0], context=(9,))
        assert unversioned(store.get_header(asked)) == unversioned(reference.get_header(asked))

    def test_stale_is_over_with_the_record(self, store: ChunkStore) -> None:
        store.put(KEYS[0], make_kv(KEYS[0]))
        store.delete(KEYS[0])
        miss = store.get_header(replace(KEYS[0], fingerprint=OTHER))
        assert isinstance(miss, Miss) and miss.reason == "absent"

    def test_another_tenants_tokens_are_absent_not_stale(self, store: ChunkStore) -> None:
        _fill(store)
        miss = store.get_header(replace(KEYS[0], tenant="other"))
        assert miss == Miss("absent", "these tokens are not stored")

    def test_hits_and_misses_are_counted(self, store: ChunkStore, reference: MemoryStore) -> None:
        for each in (store, reference):
            _fill(each)
            each.get_header(KEYS[0])
            each.get(KEYS[1])
            each.get_header(make_key(50))
            each.get(replace(KEYS[0], mode="context"))
            each.has(KEYS[0])
            with pytest.raises(StoreError):
                each.layer(make_key(50), 0)
        assert store.stats() == reference.stats()
        assert store.stats().hits == 2
        assert store.stats().misses == {"absent": 2, "stale": 1}

    def test_stats_by_fingerprint(self, store: ChunkStore, reference: MemoryStore) -> None:
        for each in (store, reference):
            _fill(each)
            each.put(replace(KEYS[0], fingerprint=OTHER), make_kv(KEYS[0]))
            each.delete(KEYS[3])
        assert store.stats() == reference.stats()
        assert store.stats().fingerprints == {str(MODEL): 3, str(OTHER): 1}
        assert store.stats().payload_bytes == 4 * make_kv(KEYS[0]).spec.chunk_bytes(5)

    def test_a_layer_of_no_record_says_key_and_reason(self, store: ChunkStore) -> None:
        _fill(store)
        asked = replace(KEYS[0], mode="context")
        with pytest.raises(StoreError, match="stored in mode prefix") as caught:
            store.layer(asked, 0)
        assert (caught.value.key, caught.value.reason) == (asked.digest, "stale")

    @pytest.mark.parametrize("layer", [-1, 3])
    def test_a_layer_that_no_chunk_has(self, store: ChunkStore, layer: int) -> None:
        _fill(store)
        with pytest.raises(ValueError, match="layers 0 to 2"):
            store.layer(KEYS[0], layer)

    def test_kv_of_other_tokens_is_refused(self, store: ChunkStore) -> None:
        with pytest.raises(ValueError, match="does not belong"):
            store.put(KEYS[0], make_kv(KEYS[1]))
        assert not store.has(KEYS[0])

    def test_a_closed_store_says_so(self, store: ChunkStore) -> None:
        _fill(store)
        store.close()
        store.close()
        for call in (
            lambda: store.put(KEYS[0], make_kv(KEYS[0])),
            lambda: store.get_header(KEYS[0]),
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

    def test_many_threads(self, store: ChunkStore) -> None:
        def work(first: int) -> bool:
            key = make_key(first % 8)
            store.put(key, make_kv(key))
            return same(store.get(key), make_kv(key))

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(24)))
        assert store.stats().chunks == 8 and store.verify() == {}

    def test_put_all_is_every_put(self, store: ChunkStore, reference: MemoryStore) -> None:
        _fill(reference)
        store.put(KEYS[0], make_kv(KEYS[0], seed=1))
        store.put_all([(key, make_kv(key)) for key in KEYS])
        assert all(same(store.get(key), reference.get(key)) for key in KEYS)
        assert store.stats().payload_bytes == reference.stats().payload_bytes
        store.put_all([])

    def test_layers_of_several_chunks_are_each_ones_own(self, store: ChunkStore) -> None:
        _fill(store)
        chunks = _found(store, *KEYS)
        with store.lease(KEYS):
            for layer in range(LAYERS):
                for key, pair in zip(KEYS, store.layers(chunks, layer), strict=True):
                    kv = make_kv(key)
                    assert torch.equal(pair[0], kv.keys[layer])
                    assert torch.equal(pair[1], kv.values[layer])
        assert store.layers([], 0) == []

    def test_a_damaged_layer_is_a_counted_miss(self, store: ChunkStore) -> None:
        _fill(store)
        self.damage(store, KEYS[0], 1)
        found = store.get(KEYS[0])
        assert isinstance(found, Miss) and found.reason not in ("absent", "stale")
        with pytest.raises(StoreError) as caught:
            store.layer(KEYS[0], 1)
        assert caught.value.key == KEYS[0].digest
        assert store.stats().misses.total() > 0
        assert same(store.get(KEYS[1]), make_kv(KEYS[1]))

    def test_verify_names_what_is_damaged_and_repairs_it(self, store: ChunkStore) -> None:
        _fill(store)
        self.damage(store, KEYS[0], 1)
        assert list(store.verify()) == [KEYS[0].digest.hex()]
        assert list(store.verify(repair=True)) == [KEYS[0].digest.hex()]
        assert store.verify() == {} and not store.has(KEYS[0])
        assert all(same(store.get(key), make_kv(key)) for key in KEYS[1:])

    def test_a_change_is_one_commit(self, store: ChunkStore) -> None:
        _fill(store)
        with store.change() as change:
            assert change.delete(KEYS[0].digest) and not change.delete(make_key(50).digest)
            assert change.delete_content(KEYS[1].content) == 1
        assert store.missing(KEYS) == KEYS[:2] and store.verify() == {}

    def test_a_change_that_raises_changes_nothing(self, store: ChunkStore) -> None:
        _fill(store)
        with pytest.raises(ZeroDivisionError), store.change() as change:
            change.delete(KEYS[0].digest)
            raise ZeroDivisionError
        assert all(same(store.get(key), make_kv(key)) for key in KEYS)

    def test_chunks_are_read_while_others_are_put(self, store: ChunkStore) -> None:
        _fill(store)

        def read(turn: int) -> bool:
            key = KEYS[turn % 4]
            return same(store.get(key), make_kv(key))

        with ThreadPoolExecutor(4) as pool:
            reads = pool.map(read, range(40))
            for first in range(10, 18):
                store.put(make_key(first), make_kv(make_key(first)))
            assert all(reads)
        assert store.stats().chunks == len(KEYS) + 8

    def test_what_was_put_is_there_after_reopening(self, tmp_path: Path) -> None:
        if not self.durable:
            pytest.skip("this store ends with its process")
        with self.open(tmp_path) as store:
            _fill(store)
            before = store.stats()
        with self.open(tmp_path) as store:
            assert all(same(store.get(key), make_kv(key)) for key in KEYS)
            assert store.stats().fingerprints == before.fingerprints
            assert store.stats().payload_bytes == before.payload_bytes
