"""Damaged records in the store on disk: a miss with its reason, never wrong KV."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import pytest
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from ragcache.errors import ConfigError, StoreError
from ragcache.store import ChunkKey, DiskStore, Miss, StoredChunk
from ragcache.store.disk import chunk_files as files
from ragcache.store.disk import layer_storage, writer
from ragcache.store.disk.header_index import update_index
from ragcache.store.disk.store import FILES_FROM
from ragcache.store.key import variant_key
from ragcache.types import ChunkKV, ChunkNotes
from tests.store.samples import (
    CHUNK_BYTES,
    MODEL,
    ONE,
    OTHER,
    TWO,
    file_of,
    layer_of,
    make_key,
    make_kv,
    read_layer,
    rewrite,
    rewrite_layer,
    same,
)


@pytest.fixture
def filed(disk: DiskStore) -> DiskStore:
    """Two chunks, in files."""
    disk.convert("files")
    for key in (ONE, TWO):
        disk.put(key, make_kv(key))
    return disk


def open_files(store: DiskStore) -> int:
    """How many files of chunks this process has open."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    opened = Path("/proc/self/fd").iterdir()
    return sum(f"{store.tables.path}/kv/" in os.path.realpath(one) for one in opened)


def is_layer(pair: tuple[Tensor, Tensor], key: ChunkKey, layer: int) -> bool:
    kv = make_kv(key)
    return torch.equal(pair[0], kv.keys[layer]) and torch.equal(pair[1], kv.values[layer])


def reason(store: DiskStore, layer: int = 0) -> str | None:
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
def test_flipped_bits_in_a_header(two: DiskStore, at: int) -> None:
    rewrite(two, "headers", ONE.digest, lambda r: flip(at % len(r))(r))
    assert reason(two) == ("foreign" if at == 0 else "corrupt")
    found = two.get_header(ONE)
    assert isinstance(found, Miss) and not two.has(ONE)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_flipped_bits_in_a_layer(two: DiskStore, at: int) -> None:
    rewrite_layer(two, ONE, 1, lambda r: flip(at % len(r))(r))
    assert same(two.get(TWO), make_kv(TWO))
    assert reason(two, layer=1) == "corrupt"
    two.layer(ONE, 0)  # the others are whole


def test_truncated_records(two: DiskStore) -> None:
    rewrite_layer(two, ONE, 0, lambda r: r[:-1])
    assert reason(two) == "truncated"
    rewrite(two, "headers", ONE.digest, lambda r: r[:-1])
    assert reason(two) == "truncated"


def test_a_missing_layer(two: DiskStore) -> None:
    path, _ = file_of(two, ONE)
    if path is not None:
        path.unlink()
    with two.tables.write() as txn:
        txn.delete("layers", layer_of(ONE.digest, 2))
    assert reason(two, layer=2) == "truncated"


@pytest.mark.parametrize(("key", "layer"), [(TWO, 0), (ONE, 1)], ids=["chunks", "layers"])
def test_swapped_layers(two: DiskStore, key: ChunkKey, layer: int) -> None:
    first, second = read_layer(two, ONE, 0), read_layer(two, key, layer)
    rewrite_layer(two, ONE, 0, lambda _: second)
    rewrite_layer(two, key, layer, lambda _: first)
    for moved in ((ONE, 0), (key, layer)):
        with pytest.raises(StoreError) as caught:
            two.layer(*moved)
        assert caught.value.reason == "corrupt"


def test_a_whole_chunk_under_another_key_is_foreign(two: DiskStore) -> None:
    with two.tables.write() as txn:
        for layer in range(3):
            record = txn.get("layers", layer_of(TWO.digest, layer))
            txn.put("layers", layer_of(ONE.digest, layer), record or b"")
        txn.put("headers", ONE.digest, txn.get("headers", TWO.digest) or b"")
    assert reason(two) == "foreign"


def test_a_newer_record_is_foreign_and_says_so(two: DiskStore) -> None:
    newer = struct.pack("<I", 7)
    rewrite(two, "headers", ONE.digest, lambda r: resealed(r[:8] + newer + r[12:]))
    assert reason(two) == "foreign"
    assert two.get_header(ONE) == Miss("foreign", "record format 7; this ragcache reads format 1")


def test_random_damage_is_never_wrong_kv(two: DiskStore) -> None:
    rng = random.Random(1)
    for _ in range(30):
        if rng.random() < 0.5:
            rewrite(two, "headers", ONE.digest, partial(overwrite, rng))
        else:
            rewrite_layer(two, ONE, rng.randrange(3), partial(overwrite, rng))
        assert isinstance(two.get(ONE), Miss)
        two.put(ONE, make_kv(ONE))  # heals
        assert same(two.get(ONE), make_kv(ONE))
    assert two.verify() == {}
    assert two.stats().chunks == 2 and two.stats().payload_bytes == 2 * CHUNK_BYTES


def test_verify_names_all_damage_and_repairs_it(two: DiskStore) -> None:
    records = file_of(two, ONE)[0] is None
    three, four, orphan = make_key(3), make_key(4), b"\xee" * 32
    for key in (three, four):
        two.put(key, make_kv(key))
    rewrite(two, "headers", ONE.digest, flip(50))
    rewrite_layer(two, three, 1, flip(0))
    with two.tables.write() as txn:
        txn.put("layers", layer_of(four.digest, 9), b"extra")
        txn.put("layers", layer_of(orphan, 0), b"orphan")
    damage = {
        ONE.digest.hex(): "corrupt: the header does not match its checksum",
        three.digest.hex(): "corrupt: layer 1 does not match its checksum",
        four.digest.hex(): f"corrupt: {3 * records + 1} layers stored, {3 * records} expected",
        orphan.hex(): "truncated: 1 layers without a header",
    }
    assert two.verify() == damage
    assert two.verify(repair=True) == damage
    assert two.verify() == {}
    assert list(two.keys()) == [TWO.digest]
    assert two.stats().fingerprints == {str(TWO.fingerprint): 1}
    assert two.stats().payload_bytes == CHUNK_BYTES
    assert two.get_header(replace(ONE, mode="context")) == Miss(
        "absent", "these tokens are not stored"
    )


def test_stale_where_the_other_header_is_unreadable_is_absent(two: DiskStore) -> None:
    rewrite(two, "headers", ONE.digest, flip(50))
    miss = two.get_header(replace(ONE, fingerprint=OTHER))
    assert miss == Miss("absent", "these tokens are not stored")


def test_a_deleted_chunk_frees_its_space(two: DiskStore) -> None:
    data = two.tables.file
    for _ in range(5):
        two.put(ONE, make_kv(ONE))
    size = data.stat().st_size
    for _ in range(30):
        two.delete(ONE)
        two.put(ONE, make_kv(ONE))
    assert data.stat().st_size < 2 * size
    assert isinstance(two.get(ONE), ChunkKV)


@pytest.mark.parametrize("layout", ["records", "files"])
def test_convert_moves_every_chunk_and_keeps_what_is_noted(
    two: DiskStore, layout: Literal["records", "files"]
) -> None:
    noted = variant_key(MODEL, ONE.tokens, (7,))
    two.variants.put(noted, make_kv(noted), ChunkNotes((), (), (0.5,) * 5, 0.6))
    two.variants.add_score({noted: 2.0})
    before = two.variants.find(ONE), two.stats()
    told: list[tuple[int, int]] = []
    had_another = (file_of(two, ONE)[0] is None) == (layout == "files")
    assert two.convert(layout, progress=lambda *n: told.append(n)) == 3 * had_another
    assert told[-1] == (3, 3) and two.convert(layout) == 0
    for key in (ONE, TWO, noted):
        assert (file_of(two, key)[0] is not None) == (layout == "files")
        assert same(two.get(key), make_kv(key))
    assert two.variants.find(ONE) == before[0]  # the versions too: these are the same puts
    assert two.stats().payload_bytes == before[1].payload_bytes
    assert len(list((two.tables.path / "kv").rglob("*-*"))) == (3 if layout == "files" else 0)
    with two.tables.read() as txn:
        assert txn.count("layers") == (0 if layout == "files" else 9)
    assert two.verify() == {}


def test_convert_leaves_damage_where_it_is(two: DiskStore) -> None:
    rewrite_layer(two, ONE, 1, flip(0))
    two.convert("files")
    two.convert("records")
    assert reason(two, layer=1) == "corrupt" and len(two.verify()) == 1


def test_auto_gives_large_layers_a_file(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        tokens = tuple(range(FILES_FROM // 16))
        plane = torch.zeros(1, len(tokens), 2)
        large = ChunkKey(MODEL, tokens)
        store.put(large, ChunkKV(tokens, (plane,), (plane,)))
        store.put(ONE, make_kv(ONE))
        assert file_of(store, large)[0] is not None and file_of(store, ONE)[0] is None
        assert store.convert("auto") == 0
    with pytest.raises(ConfigError, match="layout is 'tape': it must be one of auto, records"):
        DiskStore(tmp_path / "store", layout="tape")  # type: ignore[arg-type]


def test_files_that_a_crash_left_go_at_the_next_open(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", layout="files") as store:
        store.put(ONE, make_kv(ONE))
        path, _ = file_of(store, ONE)
        assert path is not None
        other = path.name[:-8] + "00000000"
        left = path.with_name(other), path.with_name(path.name + ".part")
        for file in left:
            file.write_bytes(path.read_bytes())
    with DiskStore(tmp_path / "store", readonly=True) as store:
        assert same(store.get(ONE), make_kv(ONE)) and all(file.exists() for file in left)
    with DiskStore(tmp_path / "store") as store:
        assert not any(file.exists() for file in left)
        assert same(store.get(ONE), make_kv(ONE))


def test_a_put_that_fails_leaves_what_was_there(
    two: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise StoreError("this fault is injected")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "update_index", fails)
        with pytest.raises(StoreError, match="this fault is injected"):
            two.put(ONE, make_kv(ONE, seed=1))
    assert same(two.get(ONE), make_kv(ONE)) and two.verify() == {}
    files = list((two.tables.path / "kv").rglob("*-*"))
    assert len(files) in (0, 2)


def test_a_file_that_cannot_be_read_is_unreadable(
    filed: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        missed = filed.get(ONE)
    assert isinstance(missed, Miss) and missed.reason == "unreadable"
    assert same(filed.get(ONE), make_kv(ONE))


def test_files_that_are_read_stay_open_while_their_chunks_are_held(
    filed: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [filed.get_header(key) for key in (ONE, TWO)]
    stored = [one for one in found if isinstance(one, StoredChunk)]
    filed.layers(stored, 0)
    assert open_files(filed) == 0
    with filed.lease([ONE, TWO]):
        with filed.lease([ONE]):
            filed.layers(stored, 0)
            assert open_files(filed) == 2
        filed.layers(stored, 1)
        assert open_files(filed) == 2
    assert open_files(filed) == 0
    monkeypatch.setattr(files, "_MAX_OPEN", 1)
    with filed.lease([ONE, TWO]):
        for layer in range(3):
            pairs = filed.layers(stored, layer)
            for key, pair in zip((ONE, TWO), pairs, strict=True):
                assert is_layer(pair, key, layer)
        assert open_files(filed) == 1
    assert open_files(filed) == 0


@pytest.mark.skipif(not files._CAN_ADVISE, reason="this system takes no advice on files")
@pytest.mark.parametrize("cached", [False, True])
def test_a_disk_is_asked_ahead_and_once_for_what_it_has_to_bring(
    filed: DiskStore, monkeypatch: pytest.MonkeyPatch, *, cached: bool
) -> None:
    asked: list[tuple[bytes, int]] = []  # key and layer
    headers = {header.key: header for header in filed.headers()}

    def advise(handle: int, offset: int, length: int, _: int) -> None:
        for key, header in headers.items():
            path = filed.tables.path / "kv" / header.file[:2] / header.file
            if os.path.samestat(os.fstat(handle), path.stat()):
                found = [(at, size) for at, size, _ in header.payloads]
                asked.append((key, found.index((offset, length))))

    monkeypatch.setattr(files, "_is_cached", lambda *_: cached)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(layer_storage, "_READAHEAD_BYTES", 1)  # one chunk ahead
    stored = [one for one in map(filed.get_header, (ONE, TWO)) if isinstance(one, StoredChunk)]
    with filed.lease([ONE, TWO]):
        for layer in range(3):
            for key, pair in zip((ONE, TWO), filed.layers(stored, layer), strict=True):
                assert is_layer(pair, key, layer)
    order = [(ONE, 0), (TWO, 0), (ONE, 2), (ONE, 1), (TWO, 1), (TWO, 2)]
    assert asked == ([] if cached else [(key.digest, layer) for key, layer in order])


def test_what_is_held_is_read_to_its_end_though_it_was_deleted(filed: DiskStore) -> None:
    stored = filed.get_header(ONE)
    assert isinstance(stored, StoredChunk)
    with filed.lease([ONE]):
        filed.layers([stored], 0)
        filed.delete(ONE)
        assert is_layer(filed.layers([stored], 1)[0], ONE, 1)
    assert open_files(filed) == 0 and reason(filed) == "absent"
    assert list(filed.tables.path.glob(f"kv/*/{ONE.digest.hex()}*")) == []
    with pytest.raises(StoreError, match="is absent: these tokens are not stored"):
        filed.layers([stored], 2)


def test_a_file_that_is_read_is_not_closed_under_its_reader(
    filed: DiskStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = filed.get_header(ONE)
    assert isinstance(stored, StoredChunk)
    held = filed.lease([ONE])
    held.__enter__()
    filed.layers([stored], 0)
    read, others = os.preadv, list[IO[bytes]]()

    def lets_go(*args: Any) -> int:
        if not others:  # the hold ends, and what has a descriptor next is another file
            held.__exit__(None, None, None)
            others.append((tmp_path / "another").open("wb+"))
        return read(*args)

    monkeypatch.setattr(os, "preadv", lets_go)
    assert is_layer(filed.layers([stored], 1)[0], ONE, 1)
    assert open_files(filed) == 0
    others[0].close()


def test_a_disk_may_read_and_write_in_small_pieces(
    disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda handle, into, at: read(handle, [into[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: write(handle, data[:7], at))
    disk.convert("files")
    disk.put(ONE, make_kv(ONE))
    assert same(disk.get(ONE), make_kv(ONE))
    path, _ = file_of(disk, ONE)
    with disk.tables.read() as txn:
        header = txn.get("headers", ONE.digest)
    assert path is not None and header is not None
    assert path.read_bytes().startswith(header)  # the copy, for people


def test_put_all_is_all_or_nothing(two: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def fails(*args: object) -> None:
        calls.append(0)
        if len(calls) > 2:  # what was there is accounted for too
            raise StoreError("this fault is injected")
        update_index(*args)  # type: ignore[arg-type]

    third = make_key(7)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "update_index", fails)
        with pytest.raises(StoreError, match="this fault is injected"):
            two.put_all([(key, make_kv(key, seed=1)) for key in (third, ONE, TWO)])
    assert calls and not two.has(third) and two.verify() == {}
    assert same(two.get(ONE), make_kv(ONE)) and same(two.get(TWO), make_kv(TWO))
    assert len(list((two.tables.path / "kv").rglob("*-*"))) in (0, 2)
