"""Damaged records in the store on disk: a miss with its reason, never wrong KV."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from ragcache.errors import StoreError
from ragcache.store import ChunkKey, LmdbStore, Miss
from ragcache.types import ChunkKV
from tests.store.samples import CHUNK_BYTES, ONE, OTHER, TWO, make_key, make_kv, rewrite, same


def layer_of(digest: bytes, layer: int) -> bytes:
    return digest + layer.to_bytes(2, "big")


def reason(store: LmdbStore, layer: int = 0) -> str | None:
    """Why chunk ONE cannot be read; the same by ``layer``, ``get`` and the counters."""
    with pytest.raises(StoreError) as caught:
        store.layer(ONE, layer)
    before = store.stats().misses
    missed = store.get(ONE)
    assert isinstance(missed, Miss) and missed.reason == caught.value.reason
    assert store.stats().misses - before == {missed.reason: 1}
    assert caught.value.key == ONE.digest
    assert same(store.get(TWO), make_kv(TWO))
    return caught.value.reason


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda record: record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]


def overwrite(rng: random.Random, record: bytes) -> bytes:
    at, noise = rng.randrange(200), rng.randbytes(rng.randint(1, 40))
    return record[:at] + noise + record[at + len(noise) :]


def resealed(record: bytes) -> bytes:
    return record[:-8] + struct.pack("<Q", xxh3_64_intdigest(record[:-8]))


@pytest.mark.parametrize("at", [0, 40, 200, -1])
def test_flipped_bits_in_a_header(two: LmdbStore, at: int) -> None:
    rewrite(two, "headers", ONE.digest, lambda r: flip(at % len(r))(r))
    assert reason(two) == ("foreign" if at == 0 else "corrupt")
    found = two.find(ONE)
    assert isinstance(found, Miss) and not two.has(ONE)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_flipped_bits_in_a_layer(two: LmdbStore, at: int) -> None:
    rewrite(two, "layers", layer_of(ONE.digest, 1), lambda r: flip(at % len(r))(r))
    assert same(two.get(TWO), make_kv(TWO))
    assert reason(two, layer=1) == "corrupt"
    two.layer(ONE, 0)  # the others are whole


def test_truncated_records(two: LmdbStore) -> None:
    rewrite(two, "layers", layer_of(ONE.digest, 0), lambda r: r[:-1])
    assert reason(two) == "truncated"
    rewrite(two, "headers", ONE.digest, lambda r: r[:-1])
    assert reason(two) == "truncated"


def test_a_missing_layer(two: LmdbStore) -> None:
    with two.tables.write() as txn:
        txn.delete("layers", layer_of(ONE.digest, 2))
    assert reason(two, layer=2) == "truncated"


@pytest.mark.parametrize(("key", "layer"), [(TWO, 0), (ONE, 1)], ids=["chunks", "layers"])
def test_swapped_layers(two: LmdbStore, key: ChunkKey, layer: int) -> None:
    a, b = layer_of(ONE.digest, 0), layer_of(key.digest, layer)
    with two.tables.write() as txn:
        records = txn.get("layers", a), txn.get("layers", b)
        txn.put("layers", a, records[1] or b"")
        txn.put("layers", b, records[0] or b"")
    for moved in ((ONE, 0), (key, layer)):
        with pytest.raises(StoreError) as caught:
            two.layer(*moved)
        assert caught.value.reason == "corrupt"


def test_a_whole_chunk_under_another_key_is_foreign(two: LmdbStore) -> None:
    with two.tables.write() as txn:
        for layer in range(3):
            record = txn.get("layers", layer_of(TWO.digest, layer))
            txn.put("layers", layer_of(ONE.digest, layer), record or b"")
        txn.put("headers", ONE.digest, txn.get("headers", TWO.digest) or b"")
    assert reason(two) == "foreign"


def test_a_newer_record_is_foreign_and_says_so(two: LmdbStore) -> None:
    newer = struct.pack("<I", 7)
    rewrite(two, "headers", ONE.digest, lambda r: resealed(r[:8] + newer + r[12:]))
    assert reason(two) == "foreign"
    assert two.find(ONE) == Miss("foreign", "record format 7; this ragcache reads format 1")


def test_random_damage_is_never_wrong_kv(two: LmdbStore) -> None:
    rng = random.Random(1)
    for _ in range(30):
        table = rng.choice(["headers", "layers"])
        key = ONE.digest if table == "headers" else layer_of(ONE.digest, rng.randrange(3))
        rewrite(two, table, key, partial(overwrite, rng))
        assert isinstance(two.get(ONE), Miss)
        two.put(ONE, make_kv(ONE))  # heals
        assert same(two.get(ONE), make_kv(ONE))
    assert two.verify() == {}
    assert two.stats().chunks == 2 and two.stats().payload_bytes == 2 * CHUNK_BYTES


def test_verify_names_all_damage_and_repairs_it(two: LmdbStore) -> None:
    three, four, orphan = make_key(3), make_key(4), b"\xee" * 32
    for key in (three, four):
        two.put(key, make_kv(key))
    rewrite(two, "headers", ONE.digest, flip(50))
    rewrite(two, "layers", layer_of(three.digest, 1), flip(0))
    with two.tables.write() as txn:
        txn.put("layers", layer_of(four.digest, 9), b"extra")
        txn.put("layers", layer_of(orphan, 0), b"orphan")
    damage = {
        ONE.digest.hex(): "corrupt: the header does not match its checksum",
        three.digest.hex(): "corrupt: layer 1 does not match its checksum",
        four.digest.hex(): "corrupt: 4 layers stored, 3 expected",
        orphan.hex(): "truncated: 1 layers without a header",
    }
    assert two.verify() == damage
    assert two.verify(repair=True) == damage
    assert two.verify() == {}
    assert list(two.keys()) == [TWO.digest]
    assert two.stats().fingerprints == {str(TWO.fingerprint): 1}
    assert two.stats().payload_bytes == CHUNK_BYTES
    assert two.find(replace(ONE, mode="context")) == Miss("absent", "these tokens are not stored")


def test_max_bytes(tmp_path: Path) -> None:
    with LmdbStore(tmp_path / "store", max_bytes=2 * CHUNK_BYTES) as store:
        for key in (ONE, TWO, TWO):
            store.put(key, make_kv(key))
        with pytest.raises(StoreError, match="raise max_bytes"):
            store.put(make_key(3), make_kv(make_key(3)))
        assert store.stats().chunks == 2
        store.delete(ONE)
        store.put(make_key(3), make_kv(make_key(3)))


def test_stale_where_the_other_header_is_unreadable_is_absent(two: LmdbStore) -> None:
    rewrite(two, "headers", ONE.digest, flip(50))
    miss = two.find(replace(ONE, fingerprint=OTHER))
    assert miss == Miss("absent", "these tokens are not stored")


def test_a_deleted_chunk_frees_its_space(two: LmdbStore) -> None:
    data = two.tables.path / "data.mdb"
    for _ in range(5):
        two.put(ONE, make_kv(ONE))
    size = data.stat().st_size
    for _ in range(30):
        two.delete(ONE)
        two.put(ONE, make_kv(ONE))
    assert data.stat().st_size < 2 * size
    assert isinstance(two.get(ONE), ChunkKV)
