"""A full store: what is evicted, what never is, and what is known after a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ragcache.errors import ConfigError, StoreError
from ragcache.store import Catalog, ChunkKey, DiskStore, LayerReader, StoredChunk
from ragcache.store.disk.quota import Quota
from ragcache.types import Chunk, Document
from tests.store.samples import CHUNK_BYTES, MODEL, make_key, make_kv, same

A, B, C, D, E = KEYS = [make_key(first) for first in range(5)]
Open = Callable[..., DiskStore]


@pytest.fixture(params=["records", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Open the same store, with room for ``chunks`` chunks of equal size."""

    def open_store(chunks: int = 3, policy: str = "lru", tenant: int | None = None) -> DiskStore:
        quota = Quota(chunks * CHUNK_BYTES, tenant and tenant * CHUNK_BYTES)
        return DiskStore(tmp_path / "store", layout=request.param, quota=quota, policy=policy)

    return open_store


def put(store: DiskStore, *keys: ChunkKey) -> None:
    for key in keys:
        store.put(key, make_kv(key))


def there(store: DiskStore) -> list[ChunkKey]:
    return [key for key in KEYS if store.has(key)]


def test_the_least_recently_used_makes_room(store: Open) -> None:
    with store() as s:
        put(s, A, B, C)
        s.get_header(A)
        put(s, D)
        assert there(s) == [A, C, D] and s.stats().evictions == 1
        put(s, D, D)  # replacing takes no room
        assert there(s) == [A, C, D] and s.stats().payload_bytes == 3 * CHUNK_BYTES
        s.delete(C)
        put(s, E)
        assert there(s) == [A, D, E] and s.stats().evictions == 1
        assert all(same(s.get(key), make_kv(key)) for key in there(s)) and s.verify() == {}


def test_a_restart_remembers_who_was_used(store: Open) -> None:
    with store() as s:
        put(s, C, A, B)
        first, second, last = sorted((A, B, C), key=lambda key: key.digest, reverse=True)
        for key in (first, second, last):  # in another order than the digests'
            s.get_header(key)
    with store() as s:
        put(s, D)
        assert not s.has(first) and s.has(second) and s.has(last)
        put(s, E)
        assert not s.has(second) and s.has(last)
    with store(chunks=1) as s:  # a smaller quota takes hold with the next put
        put(s, A)
        assert there(s) == [A]


def test_a_store_that_had_no_quota_gets_one(store: Open, tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as s:
        put(s, A, B, C, D)
    with store(chunks=2) as s:
        put(s, E)
        assert len(there(s)) == 2 and s.has(E)


def test_frequency_counts_for_pgdsf(store: Open) -> None:
    with store(policy="pgdsf") as s:
        put(s, A, B, C)
        for _ in range(3):
            s.get_header(A)
        s.get_header(B)
        s.get_header(C)
        s.get_header(C)
        put(s, D)
        assert there(s) == [A, C, D]


def test_what_a_use_was_worth_counts_for_craft(store: Open) -> None:
    with store(policy="craft") as s:
        put(s, A, B, C)
        s.variants.add_score({A: 5.0, C: 2.0})
        put(s, D)
        assert there(s) == [A, C, D]


def test_a_chunk_that_is_being_read_stays(store: Open) -> None:
    with store() as s:
        put(s, A, B, C)
        found = s.get_header(A)
        s.get_header(B)
        s.get_header(C)
        assert isinstance(found, StoredChunk)
        with LayerReader(s, [found]) as reader:
            reader.start(range(3))
            put(s, D)
            for layer in range(3):
                reader.layer(layer)
            assert there(s) == [A, C, D]
        put(s, E)
        assert there(s) == [C, D, E]


def test_pinned_documents_stay_and_a_store_of_them_is_full(store: Open) -> None:
    with store() as s:
        put(s, A, B, C)
        catalog = Catalog(s)
        for name, key in {"a": A, "b": B, "c": C}.items():
            vectors = np.ones((1, 4), np.float32)
            chunks, document = [Chunk(name, 0, "text")], Document(name, "text")
            pinned = {"contents": [key.content], "pinned": True}
            catalog.put_document(document, chunks, vectors, b"", **pinned)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="all else is pinned or being read. Raise max_bytes"):
            put(s, D)
        assert there(s) == [A, B, C] and s.verify() == {} and s.stats().evictions == 0
        catalog.set_retention("b", pinned=False)
        put(s, D)
        assert there(s) == [A, C, D]


def test_a_chunk_larger_than_the_store_is_refused(store: Open) -> None:
    with store(chunks=1) as s:
        put(s, A)
        large = ChunkKey(MODEL, tuple(range(6)))
        with pytest.raises(StoreError, match="the store may hold .* bytes of KV and would hold"):
            s.put(large, make_kv(large))
        assert there(s) == [A]


def test_tenants_have_their_own_room(store: Open) -> None:
    mine, yours = (
        [ChunkKey(MODEL, key.tokens, tenant=name) for key in KEYS] for name in ("me", "you")
    )
    with store(chunks=4, tenant=2) as s:
        put(s, *mine[:3])
        assert [s.has(key) for key in mine[:3]] == [False, True, True]
        put(s, yours[0])
        assert s.stats().chunks == 3
        put(s, mine[3], yours[1])
        assert [s.has(key) for key in mine[:4]] == [False, False, True, True]
        assert s.has(yours[0]) and s.has(yours[1])
        put(s, A)  # the store is full: whoever holds most gives up
        assert s.stats().chunks == 4 and s.has(A)


def test_an_unknown_policy_is_refused_and_claims_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy 'fifo' is unknown: use one of lru"):
        DiskStore(tmp_path / "store", quota=Quota(1), policy="fifo")
    DiskStore(tmp_path / "store").close()
