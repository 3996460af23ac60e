"""The store over a remote: the contract with no room on disk, what is sent and read, and faults."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("obstore")

from ragcache.errors import ConfigError, RemoteError, StoreError
from ragcache.store import Catalog, ChunkKey, ChunkStore, LayerReader, Miss, StoredChunk, StoreStats
from ragcache.store.disk.quota import Quota
from ragcache.store.format.header import Header
from ragcache.store.key import with_codec
from ragcache.store.remote.chunk_objects import ChunkObjects, ObjectHeader, digest_of, object_name
from ragcache.store.remote.object_store import Bucket, RetryPolicy
from ragcache.store.remote.store import RemoteStore
from ragcache.testing.store import ChunkStoreTests
from ragcache.types import Chunk, ChunkKV, Document
from tests.store.remote import s3
from tests.store.remote.faulty import FAULTS, Faulty, faulty
from tests.store.remotes import HASTY, over
from tests.store.samples import CHUNK_BYTES, LAYERS, MODEL, make_key, make_kv, rewrite_layer, same

A, B, C = KEYS = [make_key(first) for first in range(3)]
NOTHING = Quota(0)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server."""
    pytest.importorskip("moto.server")
    with s3.serving() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty remote on that server."""
    for name, value in s3.environment(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """The same server, behind a proxy that can make faults."""
    with faulty(server) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


class Distant(RemoteStore):
    """Has no room on disk: the contract's tests look at the remote. Counts what is there."""

    @classmethod
    def over(cls, path: Path, url: str = "") -> Distant:
        made = over(path / "store", url, quota=NOTHING)
        made.__class__ = cls
        return made  # type: ignore[return-value]

    def delete(self, key: ChunkKey) -> bool:
        deleted = super().delete(key)
        self.write_back.flush()
        return deleted

    def keys(self) -> Iterator[bytes]:
        assert not list(self.disk.keys())
        return iter(sorted(digest_of(name) for name, _ in self.objects.names()))

    def stats(self) -> StoreStats:
        found = super().stats()
        seen = [self.objects.fetch_header(name) for name, _ in self.objects.names()]
        headers = [one.header for one in seen if isinstance(one, ObjectHeader)]
        names = [header.name for header in headers]
        return replace(
            found,
            chunks=len(headers),
            payload_bytes=sum(header.payload_bytes for header in headers),
            fingerprints={name: names.count(name) for name in names},
            fingerprint_bytes={
                name: sum(each.payload_bytes for each in headers if each.name == name)
                for name in names
            },
        )


class Remote(ChunkStoreTests):
    """The contract over a remote."""

    def test_a_change_is_one_commit(self, store: ChunkStore) -> None:
        pytest.skip("a change is of the chunks on disk: see test_a_document_that_goes_...")


class TestFolder(Remote):
    def open(self, path: Path) -> ChunkStore:
        return Distant.over(path)


class TestServer(Remote):
    @pytest.fixture(autouse=True)
    def empty_bucket(self, bucket: str) -> None:
        self.url = bucket

    def open(self, path: Path) -> ChunkStore:
        return Distant.over(path, self.url)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[..., RemoteStore]]:
    """Makes stores of machines that share one remote."""
    with ExitStack() as opened:
        yield lambda name, **more: opened.enter_context(over(tmp_path / name, **more))


Machines = Callable[..., RemoteStore]


def read(store: ChunkStore, *keys: ChunkKey, layers: range = range(LAYERS)) -> None:
    """Read chunks as a prompt does, and compare with what was put."""
    found = store.get_headers(keys)
    chunks = [one for one in found if isinstance(one, StoredChunk)]
    assert len(chunks) == len(keys), found
    with LayerReader(store, chunks) as reader:
        reader.start(layers)
        for layer in layers:
            for key, (k, v) in zip(keys, reader.layer(layer), strict=True):
                kv = make_kv(key)
                assert torch.equal(k, kv.keys[layer]) and torch.equal(v, kv.values[layer])


def fill(store: RemoteStore, *keys: ChunkKey) -> None:
    for key in keys:
        store.put(key, make_kv(key))
    store.flush()


def test_what_one_machine_has_put_another_finds(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    fill(one, *KEYS)
    assert one.traffic.sent == 3 and one.traffic.waiting == 0
    found = two.get_header(A)
    assert isinstance(found, StoredChunk) and found.is_remote and not two.disk.has(A)
    assert found == one.get_header(A) and not one.get_header(A).is_remote  # type: ignore[union-attr]
    assert two.get_header(make_key(7)) == Miss("absent", "these tokens are not stored")
    read(two, *KEYS)


def test_what_was_read_is_here_afterwards(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    fill(one, *KEYS)
    read(two, A, B)
    read(two, C, layers=range(1, LAYERS))  # a method that computes the first layer in full
    two.flush()
    assert two.traffic.kept == 3 and two.disk.stats().chunks == 3 and two.disk.verify() == {}
    assert all(same(two.disk.get(key), make_kv(key)) for key in KEYS)
    before = two.traffic.read_bytes
    read(two, *KEYS)
    assert two.traffic.read_bytes == before == 3 * CHUNK_BYTES
    assert two.traffic.waiting == 0  # what came from there is not sent there


def test_the_disk_keeps_to_its_quota(machines: Machines) -> None:
    one, two = machines("one"), machines("two", quota=Quota(2 * CHUNK_BYTES))
    fill(one, *KEYS)
    for _ in range(2):
        for key in KEYS:
            read(two, key)
            two.flush()
    assert two.disk.stats().payload_bytes == 2 * CHUNK_BYTES
    assert two.disk.stats().evictions >= 1 and two.traffic.kept >= 4
    read(two, *KEYS)


def test_a_chunk_that_never_fits_is_read_from_the_remote(machines: Machines) -> None:
    one, two = machines("one"), machines("two", quota=NOTHING)
    fill(one, A)
    for _ in range(2):
        read(two, A)
        two.flush()
        assert same(two.get(A), make_kv(A))
    assert two.disk.stats().chunks == 0 and two.traffic.read_bytes == 4 * CHUNK_BYTES


def test_a_put_that_finds_no_room_is_in_the_remote_when_it_returns(machines: Machines) -> None:
    one, two = machines("one", quota=NOTHING), machines("two")
    one.put(A, make_kv(A))
    assert one.traffic.waiting == 0
    read(two, A)


def test_what_is_still_to_be_sent_is_not_evicted(tmp_path: Path) -> None:
    with over(tmp_path / "one", quota=Quota(CHUNK_BYTES)) as store:
        with store.write_back._turn:  # the remote is slow
            store.put(A, make_kv(A))
            store.put(B, make_kv(B))  # no room: it goes there at once
            assert store.disk.has(A) and not store.disk.has(B)
        store.flush()
        store.put(C, make_kv(C))
        assert store.disk.has(C) and not store.disk.has(A)
        read(store, *KEYS)


def test_what_was_acknowledged_is_sent_by_the_next_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tests.store.remotes import over\n"
        "from tests.store.samples import make_key, make_kv\n"
        "store = over(Path(sys.argv[1])); store.write_back._turn.acquire()\n"
        "for n in range(3): store.put(make_key(n), make_kv(make_key(n)))\n"
        "store.disk.delete(make_key(1)); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "one")], check=False)
    assert done.returncode == 9
    with over(tmp_path / "one") as one, over(tmp_path / "two") as two:
        one.flush()
        assert isinstance(two.get_header(B), Miss)
        read(two, A, C)


def test_a_deletion_is_one_everywhere(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    fill(one, A, B)
    with one.write_back._turn:  # before the remote has been told
        assert one.delete(A)
        assert isinstance(one.get_header(A), Miss) and not one.delete(A)
        with pytest.raises(StoreError):
            one.layer(A, 0)
    one.flush()
    assert isinstance(two.get_header(A), Miss) and two.has(B)
    one.put(A, make_kv(A))
    one.flush()
    read(two, A)


def test_a_document_that_goes_takes_its_kv_with_it(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    catalog = Catalog(one.disk)
    vectors = torch.eye(2).numpy()
    for name, key in (("a", A), ("b", B)):
        document, chunk = Document(name, name), Chunk(name, 0, name)
        catalog.put_document(document, [chunk], vectors[:1], b"", contents=[key.content])
    fill(one, A, B)
    assert catalog.delete_document("a")
    assert isinstance(one.get_header(A), Miss)
    one.write_back.flush()
    assert isinstance(two.get_header(A), Miss) and two.has(B)
    one.put(A, make_kv(A))  # and back, in one go with the deletion
    assert catalog.delete_document("b")
    one.put(B, make_kv(B))
    one.flush()
    read(two, A, B)


def test_a_chunk_that_is_damaged_here_comes_from_there(machines: Machines) -> None:
    one = machines("one")
    fill(one, A)
    rewrite_layer(one.disk, A, 1, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    read(one, A)
    one.flush()
    assert one.traffic.healed == 1 and one.stats().misses == {}
    assert same(one.disk.get(A), make_kv(A))


def test_a_chunk_that_is_damaged_here_and_nowhere_else(machines: Machines) -> None:
    one = machines("one")
    with one.write_back._turn:
        one.put(A, make_kv(A))
        rewrite_layer(one.disk, A, 1, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
        assert one.get(A).reason == "corrupt"  # type: ignore[union-attr]
        with pytest.raises(StoreError, match="not in the remote") as caught:
            one.layer(A, 1)
        assert caught.value.reason == "corrupt" and one.stats().misses == {"corrupt": 2}
    one.flush()
    assert one.traffic.sent == 0 and list(one.objects.names()) == []


def test_copies_in_other_codecs_are_sent_and_found(tmp_path: Path) -> None:
    codecs = "int8", "fp8"
    with (
        over(tmp_path / "one", remote_codecs=codecs) as one,
        over(tmp_path / "two", remote_codecs=codecs) as two,
    ):
        fill(one, A, B)
        found = two.get_header(A)
        assert isinstance(found, StoredChunk)
        ((int8, fp8),) = two.alternatives([found])
        assert (int8.codec, fp8.codec) == ("int8", "fp8") and int8.key == with_codec(A, "int8")
        assert int8.payload_bytes < found.payload_bytes and int8.is_remote
        with two.lease([int8.key]):
            pairs = [two.layers([int8], layer)[0] for layer in range(LAYERS)]
        kv = make_kv(A)
        for (keys, values), k, v in zip(pairs, kv.keys, kv.values, strict=True):
            torch.testing.assert_close(keys, k, atol=0.03, rtol=0)
            torch.testing.assert_close(values, v, atol=0.03, rtol=0)
        two.flush()
        ((here, _),) = two.alternatives([found])
        assert not here.is_remote
        assert one.alternatives([one.get_header(A)]) == [()]  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="codec 'int9' is unknown"):
        RemoteStore(one.disk, one.objects, remote_codecs=("int9",))


def test_an_object_is_the_chunks_file(machines: Machines, tmp_path: Path) -> None:
    one = machines("one")
    fill(one, A)
    raw = (tmp_path / "remote" / object_name(A.content, A.digest)).read_bytes()
    seen = one.objects.get_header(A)
    assert isinstance(seen, ObjectHeader)
    assert [payload.offset % 4096 for payload in seen.header.payloads] == [0] * LAYERS
    record = one.disk.record(A.digest)
    assert not isinstance(record, Miss)
    for (offset, length, _), layer in zip(seen.header.payloads, record.raws, strict=True):
        assert raw[offset : offset + length] == layer.tobytes()


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "empty": (lambda raw: b"", {"truncated"}),
    "a few bytes": (lambda raw: raw[:20], {"truncated"}),
    "no header": (lambda raw: b"<html>" + raw[6:], {"foreign"}),
    "half a header": (lambda raw: raw[:200], {"truncated"}),
    "header": (lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], {"corrupt"}),
    "last layer cut": (lambda raw: raw[:-1], {"truncated"}),
    "last layer": (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), {"corrupt"}),
    "a longer header": (
        lambda raw: raw[:12] + b"\xff\xff\0\0" + raw[16:],
        {"corrupt", "truncated"},
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_object_is_a_miss_and_is_replaced(
    machines: Machines, tmp_path: Path, what: str
) -> None:
    damage, reasons = DAMAGES[what]
    one, two = machines("one"), machines("two")
    fill(one, A)
    path = tmp_path / "remote" / object_name(A.content, A.digest)
    path.write_bytes(damage(path.read_bytes()))
    found = two.get(A)
    assert isinstance(found, Miss) and found.reason in reasons
    assert set(two.stats().misses) == {found.reason}
    two.delete(A)  # what an answer does that comes upon it
    two.put(A, make_kv(A))
    two.flush()
    read(machines("three"), A)


def test_another_chunk_under_a_name_is_foreign(machines: Machines, tmp_path: Path) -> None:
    one, two = machines("one"), machines("two")
    fill(one, A, B)
    remote = tmp_path / "remote"
    other = (remote / object_name(B.content, B.digest)).read_bytes()
    (remote / object_name(A.content, A.digest)).write_bytes(other)
    found = two.get_header(A)
    assert isinstance(found, Miss) and found.reason == "foreign"
    read(two, B)


def test_a_chunk_that_is_replaced_while_it_is_read(bucket: str, tmp_path: Path) -> None:
    with over(tmp_path / "one", bucket) as one, over(tmp_path / "two", bucket) as two:
        fill(one, A)
        assert isinstance(two.get_header(A), StoredChunk)
        one.put(A, make_kv(A, seed=1))
        one.flush()
        keys, _ = two.layer(A, 0)
        assert torch.equal(keys, make_kv(A, seed=1).keys[0])


def test_who_puts_first_is_left_alone_by_a_push_and_not_by_a_put(
    bucket: str, tmp_path: Path
) -> None:
    def seen(name: str) -> ChunkKV | Miss:
        with over(tmp_path / name, bucket) as store:
            return store.get(A)

    with over(tmp_path / "one", bucket) as one, over(tmp_path / "two", bucket) as two:
        fill(one, A)
        two.disk.outbox_codecs = None
        two.disk.put(A, make_kv(A, seed=1))
        record = two.disk.record(A.digest)
        assert not isinstance(record, Miss)
        assert not two.objects.put(record, replacing=False)
        assert same(seen("three"), make_kv(A))
        assert two.objects.put(record, replacing=True)
        assert not two.objects.put(record, replacing=True)  # as after an answer that was lost
        assert same(seen("four"), make_kv(A, seed=1))


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_tried_again_and_counted(
    proxy: Faulty, bucket: str, tmp_path: Path, kind: str
) -> None:
    with over(tmp_path / "one", bucket) as one, over(tmp_path / "two", bucket) as two:
        fill(one, A)
        proxy.kinds, proxy.share, proxy.left = (kind,), 1.0, 2
        read(two, A)
        assert proxy.done == {kind: 2} and two.traffic.retries == 2 and two.traffic.failed == 0
        proxy.left = 0 if kind in ("truncated", "wrong bytes") else 2  # of what has a body
        fill(one, B)
        read(two, B)


def test_bytes_that_stay_wrong_are_a_miss(proxy: Faulty, bucket: str, tmp_path: Path) -> None:
    with over(tmp_path / "one", bucket) as one, over(tmp_path / "two", bucket) as two:
        fill(one, A)
        found = two.get_header(A)
        assert isinstance(found, StoredChunk)
        proxy.kinds, proxy.share, proxy.left = ("wrong bytes",), 1.0, 1000
        with pytest.raises(StoreError) as caught:
            two.layer(A, 0)
        assert (caught.value.key, caught.value.reason) == (A.digest, "corrupt")
        assert two.stats().misses == {"corrupt": 1} and two.traffic.retries == HASTY.attempts - 1
        proxy.left = 0
        read(two, A)  # it was the network


def test_a_remote_that_is_out_is_a_miss_and_left_alone(
    proxy: Faulty, bucket: str, tmp_path: Path
) -> None:
    patience = replace(HASTY, rest_s=60.0)
    with (
        over(tmp_path / "one", bucket) as one,
        over(tmp_path / "two", bucket, patience=patience) as two,
    ):
        fill(one, *KEYS)
        assert isinstance(two.get_header(A), StoredChunk)
        proxy.kinds, proxy.share, proxy.left = ("500",), 1.0, 1000
        found = two.get_header(B)
        assert isinstance(found, Miss) and found.reason == "unreadable"
        assert "cannot be reached: 4 attempts" in found.detail
        before = len(proxy.requests)
        with pytest.raises(StoreError, match="left alone") as caught:
            two.layer(A, 0)
        assert caught.value.reason == "unreadable" and len(proxy.requests) == before
        assert two.traffic.refused == 1 and two.traffic.failed == 1
        two.put(C, make_kv(C))  # is acknowledged here all the same
        read(two, C)
        with pytest.raises(RemoteError):
            two.flush()
        assert two.traffic.waiting == 1
        proxy.left = 0
        two._patience_s = 0


def round_trip(
    proxy: Faulty, bucket: str, tmp_path: Path, chunks: int, faults: int, share: float
) -> None:
    """Put chunks on one machine and read them on another, with faults injected into both."""
    keys = [ChunkKey(MODEL, (n, n + 1, n + 2)) for n in range(chunks)]
    patience = replace(HASTY, attempts=8)
    with over(tmp_path / "one", bucket, patience=patience) as one:
        proxy.share, proxy.left = share, faults // 2
        fill(one, *keys)
        proxy.left = faults - proxy.done.total()
        wrong = failed = 0
        with over(tmp_path / "two", bucket, quota=NOTHING, patience=patience) as two:
            for key in keys:
                found = two.get(key)
                if isinstance(found, Miss):
                    failed += 1
                    assert found.reason in ("unreadable", "corrupt", "truncated", "foreign")
                else:
                    wrong += not same(found, make_kv(key))
            assert (wrong, failed) == (0, 0)
            assert proxy.done.total() == faults and set(proxy.done) == set(FAULTS)
            harmless = one.traffic.retries + two.traffic.retries
            assert faults - proxy.done["wrong bytes"] - proxy.done["truncated"] <= harmless


def test_a_round_trip_through_faults(proxy: Faulty, bucket: str, tmp_path: Path) -> None:
    round_trip(proxy, bucket, tmp_path, chunks=40, faults=40, share=0.25)


@pytest.mark.slow
def test_a_thousand_chunks_through_two_hundred_faults(
    proxy: Faulty, bucket: str, tmp_path: Path
) -> None:
    round_trip(proxy, bucket, tmp_path, chunks=1000, faults=200, share=0.1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "give a bucket or a folder"),
        ("ftp://host/x", "with one of s3://"),
        ("s3://", "give a bucket"),
        ("s3://key:secret@bucket", "credentials"),
        ("s3://bucket?aws_access_key_id=1", "credentials"),
        ("file://folder", "three slashes"),
    ],
)
def test_urls_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bucket(url)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Bucket((tmp_path / "file" / "x").as_uri())


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "ragcache.store.remote.object_store")
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[s3\]'"):
        import_module("ragcache.store.remote.object_store")


def test_waits_between_attempts_double_and_end() -> None:
    patience = RetryPolicy(first_s=1.0, longest_s=3.0)
    longest = [max(patience.wait_s(n) for _ in range(2000)) for n in (1, 2, 3, 4)]
    assert longest == pytest.approx([1, 2, 3, 3], rel=0.01)


def test_a_reader_asks_for_layers_and_not_for_whole_objects(
    proxy: Faulty, bucket: str, tmp_path: Path
) -> None:
    with over(tmp_path / "one", bucket) as one, over(tmp_path / "two", bucket) as two:
        fill(one, A)
        proxy.requests.clear()
        read(two, A, layers=range(1, 2))
        seen = two.objects.get_header(A)
        assert isinstance(seen, ObjectHeader) and isinstance(seen.header, Header)
        offset, length, _ = seen.header.payloads[1]
        ranges = [asked for method, _, asked in proxy.requests[:2]]
        assert ranges == ["bytes=0-16383", f"bytes={offset}-{offset + length - 1}"]


def test_the_environment_is_where_credentials_come_from(bucket: str) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in repr(vars(Bucket(bucket)))


def test_objects_of_somebody_else(tmp_path: Path) -> None:
    objects = ChunkObjects(Bucket(tmp_path.as_uri(), HASTY))
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "readme.txt").write_text("hello")
    assert list(objects.names()) == []
    assert isinstance(objects.get_header(A), Miss)


def test_kv_is_what_comes_back(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    kv = make_kv(A, dtype=torch.bfloat16)
    one.put(A, kv)
    one.flush()
    found = two.get(A)
    assert isinstance(found, ChunkKV) and same(found, kv)
