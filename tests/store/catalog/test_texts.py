"""Temporary texts, which earlier releases stored among the settings."""

from __future__ import annotations

from pathlib import Path

import lmdb

from ragcache.store import Catalog, DiskStore, MemoryStore
from ragcache.store.lmdb.tables import TABLES


def test_a_text_is_kept_until_it_is_dropped(tmp_path: Path) -> None:
    long = "Å" * 100_000
    with DiskStore(tmp_path / "store") as disk, MemoryStore() as memory:
        for store in (disk, memory):
            catalog = Catalog(store)
            catalog.put_text("job-texts:1", long)
            assert catalog.get_text("job-texts:1") == long and catalog.settings("") == {}
            assert catalog.drop_text("job-texts:1") and not catalog.drop_text("job-texts:1")
            assert catalog.get_text("job-texts:1") is None


def test_those_of_an_earlier_release_are_found_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with DiskStore(path) as store:
        Catalog(store).put_setting("job-texts:1", "[]")
    with lmdb.open(str(path), max_dbs=2 * len(TABLES), map_size=1 << 30) as env:
        with env.begin(write=True) as txn:
            txn.drop(env.open_db(b"texts", txn=txn), delete=True)
    with DiskStore(path, readonly=True) as store:
        assert Catalog(store).get_text("job-texts:1") == "[]"
    with DiskStore(path, lazy=True) as store:
        catalog = Catalog(store)
        assert catalog.get_text("job-texts:1") == "[]"
        assert catalog.drop_text("job-texts:1")  # it becomes the writer, and makes the table
        catalog.put_text("job-texts:2", "[1]")
        assert catalog.get_text("job-texts:2") == "[1]" and catalog.get_text("job-texts:1") is None
