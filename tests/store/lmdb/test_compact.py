"""Compaction: space is freed, readers follow, and a crash leaves the old or the new store."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

import pytest

from ragcache.errors import StoreError
from ragcache.store import DiskStore
from ragcache.store.disk import store as disk
from ragcache.store.lmdb import current, environment
from tests.store.disk.test_processes import process
from tests.store.samples import ONE, TWO, make_key, make_kv, same


def wasteful(path: Path) -> DiskStore:
    """An open store of two chunks whose file once held two hundred."""
    store = DiskStore(path, layout="records")
    keys = [make_key(first) for first in range(10, 210)]
    for key in (ONE, TWO, *keys):
        store.put(key, make_kv(key))
    for key in keys:
        store.delete(key)
    return store


def whole(store: DiskStore) -> bool:
    return all(same(store.get(key), make_kv(key)) for key in (ONE, TWO)) and not store.verify()


def test_space_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    with wasteful(tmp_path / "store") as store:
        before, after = store.compact()
        assert after < before / 4 and after == store.tables.file.stat().st_size
        assert whole(store)
        store.put(make_key(7), make_kv(make_key(7)))
        assert store.compact()[1] >= after and whole(store)
        live = store.tables.live_bytes()
        assert live / 2 < store.tables.file.stat().st_size <= 2 * live
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"CURRENT", "data-2", "writer.lock"}
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "store").rglob("*")}
    assert modes == {0o600, 0o700}
    with DiskStore(tmp_path / "store") as store:
        assert whole(store) and store.has(make_key(7))
    with DiskStore(tmp_path / "store", readonly=True) as store:
        assert whole(store)
        with pytest.raises(StoreError, match="readonly=True"):
            store.compact()


READER = """
store = DiskStore(path, readonly=True)
print("open", flush=True)
for line in sys.stdin:
    key = make_key(int(line))
    print(same(store.get(key), make_kv(key)), store.tables.file.parent.name, flush=True)
"""


def test_a_reader_in_another_process_follows(tmp_path: Path) -> None:
    with wasteful(tmp_path / "store") as store, process(tmp_path / "store", READER) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()

        def ask(first: int) -> list[str]:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(f"{first}\n")
            child.stdin.flush()
            return child.stdout.readline().split()

        assert ask(1) == ["True", "store"]
        store.compact()
        store.put(make_key(7), make_kv(make_key(7)))
        assert ask(1) == ["True", "data-1"] and ask(7) == ["True", "data-1"]


def test_a_transaction_ends_in_the_environment_it_began_in(tmp_path: Path) -> None:
    with wasteful(tmp_path / "store") as store:
        with store.tables.read() as txn:
            store.compact()
            store.delete(ONE)
            assert txn.get("headers", ONE.digest) is not None
        assert not store.has(ONE) and store.has(TWO)


@pytest.mark.parametrize("step", ["copyfd", "sync", "replace", "clean"])
def test_a_crash_leaves_the_old_store_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Crash(Exception):
        pass

    def crash(*args: object, **kwargs: object) -> None:
        raise Crash

    store = wasteful(tmp_path / "store")
    with monkeypatch.context() as patch:
        if step == "copyfd":
            patch.setattr(os, "fsync", crash)
        elif step == "sync":
            patch.setattr(current, "sync_folder", crash)
        elif step == "replace":
            patch.setattr(Path, "replace", crash)
        else:
            patch.setattr(environment, "remove_old_folders", crash)
        with pytest.raises(Crash):
            store.compact()
    assert whole(store)  # it goes on
    store.close()
    with DiskStore(tmp_path / "store") as again:
        assert whole(again)
        data = list((tmp_path / "store").rglob("data.mdb"))
        assert data == [again.tables.file]


def test_it_happens_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WORTH_COMPACTING", 1 << 16)
    with DiskStore(tmp_path / "store", layout="records") as store:
        keys = [make_key(first) for first in range(100)]
        for key in keys:
            store.put(key, make_kv(key))
        size = store.tables.file.stat().st_size
        for key in keys[1:]:
            store.delete(key)
        assert store.tables.file.stat().st_size < size / 2
        assert same(store.get(keys[0]), make_kv(keys[0]))


@pytest.mark.parametrize("pointer", [b"../elsewhere", b"data-3 0123", b"data-\xff1 0", b""])
def test_a_damaged_pointer_says_what_to_do_and_nothing_goes(tmp_path: Path, pointer: bytes) -> None:
    with wasteful(tmp_path / "store") as store:
        store.compact()
        data = store.tables.file
    current = tmp_path / "store" / "CURRENT"
    good = current.read_text()
    current.write_bytes(pointer)
    for readonly in (False, True):
        with pytest.raises(StoreError, match="CURRENT is damaged.*Write one line") as caught:
            DiskStore(tmp_path / "store", readonly=readonly)
        assert data.is_file()
    current.write_text(str(caught.value).rpartition(": ")[2] + "\n")
    assert current.read_text() == good
    with DiskStore(tmp_path / "store") as store:
        assert whole(store)


def test_a_pointer_to_nothing_is_refused(tmp_path: Path) -> None:
    with wasteful(tmp_path / "store") as store:
        store.compact()
    (tmp_path / "store" / "data-1").rename(tmp_path / "store" / "data-7")
    with pytest.raises(StoreError, match="names data-1, which holds no data.mdb"):
        DiskStore(tmp_path / "store")
    (tmp_path / "store" / "data-7").rename(tmp_path / "store" / "data-1")
    with DiskStore(tmp_path / "store") as store:
        assert whole(store)


def test_a_compaction_that_fails_fails_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "WORTH_COMPACTING", 1 << 16)

    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(environment, "copy_compacted", fails)
    with wasteful(tmp_path / "store") as store:
        for _ in range(70):
            store.put(ONE, make_kv(ONE))
        assert whole(store) and "compaction of" in caplog.text and "disk is full" in caplog.text
        assert not list((tmp_path / "store").glob("data-*"))


def test_a_reader_that_stays_open_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.monotonic()
    with wasteful(tmp_path / "store") as store, store.tables.read():
        for later in (10, 50):
            monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
            with caplog.at_level(logging.WARNING):
                store.put(ONE, make_kv(ONE))
        assert "has been open for 40 s or more" in caplog.text
        monkeypatch.undo()
