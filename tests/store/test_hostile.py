"""Records that are valid but wrong: of another shape, codec or size, not finite, or no files."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("obstore")

from bench.reliability.hostile_remote import another_dtype, fewer_layers, more_heads
from ragcache.errors import StoreError
from ragcache.store import ChunkKey, DiskStore, MemoryStore, Miss
from ragcache.store.disk import kv_shapes
from ragcache.store.disk.layer_storage import NewChunk
from ragcache.store.disk.writer import DiskChange
from ragcache.store.format.header import Header, decode_header, encode_header
from ragcache.store.format.record import Record, encode_chunk
from ragcache.store.remote.chunk_objects import ChunkObjects, encode_object, object_name
from ragcache.store.remote.object_store import Bucket
from ragcache.store.remote.store import RemoteStore
from ragcache.store.remote.sync import pull
from ragcache.types import ChunkKV, KVSpec
from tests.store.remotes import HASTY, over
from tests.store.samples import DIM, HEADS, LAYERS, MODEL, make_key, make_kv, same

SPEC = KVSpec(LAYERS, HEADS, DIM, "float32")
KNOWN = replace(MODEL, spec=SPEC)
A, B = (make_key(first, KNOWN) for first in (1, 2))


def not_finite(kv: ChunkKV) -> ChunkKV:
    keys = [layer.clone() for layer in kv.keys]
    keys[1][0, 2, 3] = float("nan")
    return replace(kv, keys=tuple(keys))


def infinite(kv: ChunkKV) -> ChunkKV:
    values = [layer.clone() for layer in kv.values]
    values[2][1, 0, 0] = -float("inf")
    return replace(kv, values=tuple(values))


Forgery = Callable[[ChunkKV], ChunkKV]
SHAPES: list[Forgery] = [fewer_layers, more_heads, another_dtype]
NUMBERS: list[Forgery] = [not_finite, infinite]


def record_of(key: ChunkKey, forgery: Forgery = lambda kv: kv, codec: str = "raw") -> Record:
    """A record under a key with everything right but what the forgery does, checksums too."""
    kv = forgery(make_kv(key))
    from ragcache.store.format.record import encode_layers

    header = replace(Header.of(key, kv, ()), codec=codec)
    record = Record(header, tuple(encode_layers(codec, kv)))
    header, _ = encode_object(record)
    return Record(header, record.raws)


def forged(disk: DiskStore, key: ChunkKey, forgery: Forgery, codec: str = "raw") -> None:
    """Put it into a store without the store's knowledge, instead of what is there."""
    record = record_of(key, forgery, codec)
    with disk.tables.write() as txn:
        change = DiskChange(txn)
        change.delete(key.digest)
        coming = NewChunk.of(record.header, record.raws, in_file=False)
        change.insert(disk._layers.put(txn, coming))


def planted(path: Path, key: ChunkKey, data: bytes | bytearray) -> Path:
    """An object under the right name."""
    file = path / object_name(key.content, key.digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def refuses(store: RemoteStore | DiskStore | MemoryStore, key: ChunkKey, reason: str) -> None:
    """Nothing of a chunk is served, and that is counted under this reason."""
    found = store.get(key)
    assert isinstance(found, Miss) and found.reason == reason, found
    with pytest.raises(StoreError) as caught:
        for layer in range(LAYERS):
            store.layer(key, layer)
    assert caught.value.reason == reason
    assert set(store.stats().misses) == {reason}


@pytest.mark.parametrize("forgery", SHAPES)
def test_another_shape_is_foreign_here(tmp_path: Path, forgery: Forgery) -> None:
    with DiskStore(tmp_path / "store") as store:
        forged(store, A, forgery)
        refuses(store, A, "foreign")
        assert store.verify() == {}  # nobody has said what the model's shape is
        with store.tables.write() as txn:
            kv_shapes.record_shape(txn, KNOWN)
        bad = store.verify()
        assert (
            list(bad) == [A.digest.hex()] and "the model's is 3 layers of 2" in bad[A.digest.hex()]
        )
        store.put(A, make_kv(A))
        assert store.verify() == {} and same(store.get(A), make_kv(A))


@pytest.mark.parametrize("forgery", SHAPES)
def test_another_shape_is_foreign_there(tmp_path: Path, forgery: Forgery) -> None:
    _, data = encode_object(record_of(A, forgery))
    planted(tmp_path / "remote", A, data)
    with over(tmp_path / "one") as store:
        refuses(store, A, "foreign")
        store.flush()
        assert not store.disk.has(A)
        store.put(A, make_kv(A))  # what was computed takes its place
        store.flush()
    with over(tmp_path / "two") as two:
        assert same(two.get(A), make_kv(A))


def test_another_codec_is_foreign(tmp_path: Path) -> None:
    record = record_of(A, codec="int8")
    planted(tmp_path / "remote", A, encode_object(record)[1])
    with over(tmp_path / "one") as store:
        refuses(store, A, "foreign")
    with DiskStore(tmp_path / "disk") as disk:
        with disk.tables.write() as txn:
            kv_shapes.record_shape(txn, KNOWN)
        forged(disk, A, lambda kv: kv, "int8")
        refuses(disk, A, "foreign")
        assert "its codec is int8, the model's is raw" in disk.verify()[A.digest.hex()]


@pytest.mark.parametrize("forgery", NUMBERS)
@pytest.mark.parametrize("layout", ["records", "files"])
def test_what_is_not_finite_is_corrupt(tmp_path: Path, forgery: Forgery, layout: str) -> None:
    with DiskStore(tmp_path / "store", layout=layout) as store:  # type: ignore[arg-type]
        forged(store, A, forgery)
        refuses(store, A, "corrupt")
        assert "NaN or infinities" in store.verify()[A.digest.hex()]


@pytest.mark.parametrize("forgery", NUMBERS)
def test_what_is_not_finite_is_not_kept(tmp_path: Path, forgery: Forgery) -> None:
    planted(tmp_path / "remote", A, encode_object(record_of(A, forgery))[1])
    with over(tmp_path / "one") as store:
        found = store.get(A)
        assert isinstance(found, Miss) and found.reason == "corrupt"
        assert not store.disk.has(A) and store.traffic.not_kept == 1


@pytest.mark.parametrize("forgery", NUMBERS)
def test_what_is_not_finite_is_not_put(tmp_path: Path, forgery: Forgery) -> None:
    with DiskStore(tmp_path / "store") as disk, MemoryStore() as memory:
        for store in (disk, memory):
            with pytest.raises(StoreError, match="NaN or infinities, and is not stored.*--dtype"):
                store.put(A, forgery(make_kv(A)))
            with pytest.raises(StoreError, match="NaN or infinities, and is not stored"):
                store.put_all([(B, make_kv(B)), (A, forgery(make_kv(A)))])
            assert not store.has(A)
        with pytest.raises(StoreError, match="NaN or infinities, and is not stored"):
            encode_chunk(A, forgery(make_kv(A)))


def test_kv_of_another_shape_than_the_models_is_not_put(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        with pytest.raises(ValueError, match="cannot be of tiny"):
            store.put(A, fewer_layers(make_kv(A)))


def test_a_pull_leaves_what_is_foreign_where_it_is(tmp_path: Path) -> None:
    keys = [make_key(first, KNOWN) for first in range(10, 17)]
    remote = tmp_path / "remote"
    forgeries = [*SHAPES, not_finite]
    for key, forgery in zip(keys, forgeries, strict=False):
        planted(remote, key, encode_object(record_of(key, forgery))[1])
    planted(remote, keys[4], encode_object(record_of(keys[4], codec="int8"))[1])
    planted(remote, keys[5], encode_object(record_of(keys[6]))[1])  # another chunk's
    planted(remote, keys[6], encode_object(record_of(keys[6]))[1])
    with DiskStore(tmp_path / "store") as disk:
        with disk.tables.write() as txn:
            kv_shapes.record_shape(txn, KNOWN)
        done = pull(disk, ChunkObjects(Bucket(remote.as_uri(), HASTY)))
        assert (done.moved, done.foreign, done.damaged) == (1, 5, 1)
        assert list(disk.keys()) == [keys[6].digest] and disk.verify() == {}


def enlarged(tokens: int) -> bytes:
    """A header that claims a chunk of so many tokens, followed by a few bytes."""
    key = ChunkKey(KNOWN, tuple(range(tokens)))
    spec = SPEC
    length = spec.layer_bytes(tokens)
    record = record_of(A)
    from ragcache.store.disk.chunk_files import page_aligned
    from ragcache.store.format.header import Payload

    blank = replace(
        record.header,
        tokens=key.tokens,
        sensitivity=(),
        payloads=(Payload(0, 0, 0),) * LAYERS,
    )
    at, payloads = page_aligned(len(encode_header(blank))), []
    for _ in range(LAYERS):
        payloads.append(Payload(at, length, 0))
        at = page_aligned(at + length)
    return encode_header(replace(blank, payloads=tuple(payloads)))


@pytest.mark.parametrize("tokens", [50, 4_000_000])
def test_a_header_that_claims_too_much_makes_nobody_allocate(tmp_path: Path, tokens: int) -> None:
    file = planted(tmp_path / "remote", A, enlarged(tokens))
    os.truncate(file, 3 << 30)  # sparse: it takes no room
    with over(tmp_path / "one") as store:
        found = store.get_header(A)
        assert isinstance(found, Miss) and found.reason == "foreign"
        assert pull(store.disk, store.objects).foreign == 1


def test_layers_that_do_not_follow_each_other_are_foreign(tmp_path: Path) -> None:
    header, data = encode_object(record_of(A))
    far = [p._replace(offset=p.offset + (n << 31)) for n, p in enumerate(header.payloads)]
    file = planted(
        tmp_path / "remote", A, encode_header(replace(header, payloads=tuple(far))) + data[4096:]
    )
    os.truncate(file, 16 << 30)
    with over(tmp_path / "one") as store:
        refuses(store, A, "foreign")
        assert pull(store.disk, store.objects).foreign == 1


def test_a_codec_without_a_fixed_size_has_a_largest_one() -> None:
    pytest.importorskip("constriction")
    record = record_of(A, codec="cachegen")
    longest = [p._replace(length=1 << 30) for p in record.header.payloads]
    found = decode_header(encode_header(replace(record.header, payloads=tuple(longest))))
    assert isinstance(found, Miss) and "longer than its shape can be" in found.detail


@pytest.mark.parametrize("kind", ["pipe", "folder", "link in circles", "link to a device"])
def test_what_is_no_regular_file_is_opened_by_nobody(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "remote" / object_name(A.content, A.digest)
    place.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "link in circles":
        place.symlink_to(place)
    else:
        place.symlink_to("/dev/zero")
    (tmp_path / "remote" / "chunks" / "loop").symlink_to(tmp_path / "remote")
    with over(tmp_path / "one") as store:
        found: list[object] = []
        asked = threading.Thread(target=lambda: found.append(store.get_header(A)), daemon=True)
        asked.start()
        asked.join(20)
        assert found and isinstance(found[0], Miss)
        assert found[0].reason in ("foreign", "unreadable")
        assert list(store.objects.names()) == []
        assert pull(store.disk, store.objects).moved == 0
        if kind == "pipe":  # what is put takes its place
            store.put(A, make_kv(A))
            store.flush()
            assert place.is_file() and place.stat().st_mode & 0o777 == 0o600


def test_a_preamble_that_claims_gigabytes_is_foreign(tmp_path: Path) -> None:
    _, data = encode_object(record_of(A))
    data[12:16] = struct.pack("<I", 0xF0000000)
    os.truncate(planted(tmp_path / "remote", A, data), 8 << 30)
    with over(tmp_path / "one") as store:
        refuses(store, A, "foreign")
