"""The directory of a store: what is refused, error messages, and permissions."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import lmdb
import pytest

from ragcache.errors import StoreError
from ragcache.store import DiskStore, MemoryStore, Miss
from ragcache.store.lmdb import environment
from ragcache.store.lmdb.current import current_folder
from ragcache.store.lmdb.directory import translate_errors
from tests.store.samples import ONE, make_key, make_kv, rewrite, same


def test_a_full_map_says_so_and_keeps_what_was_there(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", map_size=1 << 18) as store:
        with pytest.raises(StoreError, match="map_size.*delete chunks"):
            for first in range(1000):
                store.put(make_key(first), make_kv(make_key(first)))
        assert store.verify() == {} and store.stats().chunks > 5
        assert not store.has(make_key(store.stats().chunks))


def test_permissions(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        DiskStore(tmp_path / "store").close()
    finally:
        os.umask(umask)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "store").iterdir()}
    assert modes == {"data.mdb": 0o600, "lock.mdb": 0o600, "writer.lock": 0o600}


@pytest.mark.parametrize("name", ["writer.lock", "lock.mdb", "data.mdb"])
@pytest.mark.parametrize("readonly", [False, True])
def test_links_in_the_place_of_its_files_are_refused(
    tmp_path: Path, name: str, readonly: bool
) -> None:
    with DiskStore(tmp_path / "store") as store:
        store.put(ONE, make_kv(ONE))
    victim, link = tmp_path / "victim", tmp_path / "store" / name
    victim.write_text("precious")
    link.unlink()
    link.symlink_to(victim)
    if not (readonly and name == "writer.lock"):  # which a reader does not open
        message = open_error(tmp_path / "store", readonly)
        assert f"{name} is no regular file" in message and "remove it" in message
    assert victim.read_text() == "precious"


def test_a_link_in_the_place_of_compactions_file_is_replaced(
    two: DiskStore, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("precious")
    (two.tables.path / "CURRENT.part").symlink_to(tmp_path / "victim")
    two.compact()
    assert (tmp_path / "victim").read_text() == "precious" and two.verify() == {}


@pytest.mark.parametrize("compacted", [False, True])
def test_a_file_that_was_emptied_is_damaged(two: DiskStore, compacted: bool) -> None:
    if compacted:
        two.compact()
    two.close()
    os.truncate(two.tables.file, 0)
    for readonly in (False, True):
        message = open_error(two.tables.path, readonly)
        assert "data.mdb is damaged: it is empty" in message and "Restore it" in message
    with pytest.raises(StoreError, match="is damaged"):
        DiskStore(two.tables.path, lazy=True)
    assert two.tables.file.stat().st_size == 0


def test_a_store_is_made_at_once_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it is made, nothing of it is taken for a store."""
    path = tmp_path / "store"
    with monkeypatch.context() as patch:

        def killed(*_: object) -> Path:
            raise KeyboardInterrupt

        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            DiskStore(path)
    assert not (path / "data.mdb").exists()
    with DiskStore(path) as store:
        store.put(ONE, make_kv(ONE))
    assert not list(path.glob("data.new*"))


def test_strays_are_left_alone_and_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / ".DS_Store").write_bytes(b"\0Bud1")
    with DiskStore(path, layout="files") as store:
        store.put(ONE, make_kv(ONE))
        file = next((path / "kv").glob("*/*"))
    strays = [
        path / "kv" / ".DS_Store",
        file.parent / ".DS_Store",
        file.parent / "Thumbs.db",
        file.parent / f"._{file.name}",
        file.parent / "deadbeef",
        path / "kv" / "notes" / "readme.txt",
    ]
    strays[-1].parent.mkdir()
    for stray in strays:
        stray.write_text("not ours")
    (path / "data-backup").mkdir()
    (path / "data-backup" / "data.mdb").write_text("somebody's")
    with DiskStore(path) as store:
        assert same(store.get(ONE), make_kv(ONE)) and store.verify() == {}
        assert len(store.strays()) == 6 and "notes" in store.strays()
        store.compact()
        store.compact()
        store.convert("records")
    with DiskStore(path, readonly=True) as store:
        assert store.has(ONE) and len(store.strays()) == 6
    assert all(stray.exists() for stray in strays) and (path / "data-backup" / "data.mdb").exists()


def test_the_newest_folder_is_named_where_the_pointer_is_damaged(two: DiskStore) -> None:
    two.close()
    for number in (2, 9, 10):
        (two.tables.path / f"data-{number}").mkdir()
    (two.tables.path / "CURRENT").write_text("data-10 0")
    assert "Write one line into it: data-10 " in open_error(two.tables.path)


def test_an_empty_directory_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    DiskStore(tmp_path / "store").close()
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_the_file_is_sparse(two: DiskStore) -> None:
    assert (two.tables.file).stat().st_size < 1 << 20


def open_error(path: Path, readonly: bool = False) -> str:
    with pytest.raises(StoreError) as caught:
        DiskStore(path, readonly=readonly)
    return str(caught.value)


def test_places_that_hold_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in open_error(tmp_path / "file")
    assert "no store in" in open_error(tmp_path / "file", readonly=True)
    assert "no store in" in open_error(tmp_path / "nothing", readonly=True)
    assert not (tmp_path / "nothing").exists()
    assert "is not empty and holds no store" in open_error(tmp_path)
    assert "cannot open" in open_error(Path("/proc/store"))


def test_a_store_may_be_compacted_while_a_reader_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskStore(tmp_path / "store") as store:
        store.put(ONE, make_kv(ONE))
    folders, real = [tmp_path / "store" / "data-7", tmp_path / "store" / "data-8"], current_folder

    def looked_up(path: Path) -> Path:  # these were current once, and are gone
        return folders.pop(0) if folders else real(path)

    monkeypatch.setattr(environment, "current_folder", looked_up)
    with DiskStore(tmp_path / "store", readonly=True) as store:
        assert not folders and same(store.get(ONE), make_kv(ONE))


def test_another_programs_lmdb_is_left_alone(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "theirs"), max_dbs=4) as env:
        env.open_db(b"things")
    for readonly in (False, True):
        assert "not a ragcache store" in open_error(tmp_path / "theirs", readonly)


def test_a_newer_store_is_refused(disk: DiskStore) -> None:
    rewrite(disk, "meta", b"format", lambda r: r[:8] + struct.pack("<I", 2))
    disk.close()
    assert "has format 2, this ragcache reads up to 1: upgrade" in open_error(disk.tables.path)


def test_a_damaged_file_is_refused(two: DiskStore) -> None:
    two.close()
    (two.tables.file).write_bytes(random.Random(1).randbytes(20000))
    for readonly in (False, True):
        assert "is not a store or is damaged" in open_error(two.tables.path, readonly)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.8])
def test_a_truncated_file_is_refused_and_left_as_it_is(tmp_path: Path, left: float) -> None:
    keys = [make_key(first) for first in range(30)]
    with DiskStore(tmp_path / "store", layout="records") as store:
        for key in keys:
            store.put(key, make_kv(key))
        data = store.tables.file
    whole = data.stat().st_size
    size = max(100, int(left * whole))
    os.truncate(data, size)
    message = open_error(tmp_path / "store", readonly=True)
    assert "delete the" in message or "bytes short: a writer was killed, or" in message
    message = open_error(tmp_path / "store")
    assert "data.mdb is" in message and "delete the" in message and data.stat().st_size == size
    if "truncate -s" in message:  # its trees can still be read
        command = message.split("`")[1].split()
        assert command == ["truncate", "-s", str(whole), str(data)]
        subprocess.run(command, check=True)
        with DiskStore(tmp_path / "store") as store:
            for key in keys:
                try:
                    assert isinstance(found := store.get(key), Miss) or same(found, make_kv(key))
                except StoreError as error:  # a page of a tree is gone
                    assert "damaged" in str(error)


def test_a_writer_killed_behind_its_commit_leaves_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last pages are not written, and used by nothing."""
    with DiskStore(tmp_path / "store") as store, monkeypatch.context() as patch:
        for _ in range(5):  # leaves free pages in the middle
            store.put(ONE, make_kv(ONE))
        patch.setattr(os, "truncate", lambda *_: None)  # killed before this
        with store.tables.write() as txn:
            txn.put("settings", b"scratch", bytes(100_000))
            txn.delete("settings", b"scratch")
    assert "bytes short" in open_error(tmp_path / "store", readonly=True)
    with DiskStore(tmp_path / "store") as store:
        assert same(store.get(ONE), make_kv(ONE)) and store.verify() == {}
    assert "bytes short, and is whole" in caplog.text
    with DiskStore(tmp_path / "store", readonly=True) as store:
        assert same(store.get(ONE), make_kv(ONE))


def test_the_file_covers_its_pages_after_every_commit(disk: DiskStore) -> None:
    rng = random.Random(3)
    for _ in range(40):
        with disk.tables.write() as txn:
            txn.put("layers", b"scratch", bytes(rng.randrange(200_000)))
            txn.delete("layers", b"scratch")
            txn.put("layers", rng.randbytes(8), bytes(rng.randrange(9_000)))
        info, file = disk.tables._opened.env.info(), disk.tables.file
        assert file.stat().st_size >= (info["last_pgno"] + 1) * 4096


def test_twice_in_one_process(two: DiskStore) -> None:
    path = two.tables.path
    assert "open for writing in this process" in open_error(path)
    assert "already open in this process" in open_error(path, readonly=True)
    assert "open for writing in this process" in open_error(path / ".." / "store")
    two.close()
    with DiskStore(path) as again:
        assert again.has(ONE)


def test_readonly_store_refuses_to_write(two: DiskStore) -> None:
    two.close()
    with DiskStore(two.tables.path, readonly=True) as store:
        assert same(store.get(ONE), make_kv(ONE)) and store.verify() == {}
        with pytest.raises(StoreError, match="readonly=True"):
            store.delete(ONE)


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_a_directory_of_somebody_else(two: DiskStore) -> None:
    two.close()
    two.tables.path.chmod(0)
    try:
        for readonly in (False, True):
            assert "who owns it" in open_error(two.tables.path, readonly)
    finally:
        two.tables.path.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (lmdb.MapResizedError("mdb"), "open it with that map_size"),
        (lmdb.PanicError("mdb"), "close the store and open it again"),
        (lmdb.ReadersFullError("mdb"), "Close some of them"),
    ],
)
def test_errors_of_lmdb_say_what_to_do(tmp_path: Path, error: lmdb.Error, fix: str) -> None:
    with pytest.raises(StoreError, match=fix), translate_errors(tmp_path, "write to"):
        raise error


def test_tables_that_are_closed() -> None:
    store = MemoryStore()
    store.close()
    with pytest.raises(StoreError, match="open it again"), store.tables.read():
        pass
