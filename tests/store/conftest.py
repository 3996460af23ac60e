"""Fixtures with every kind of store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ragcache.store import ChunkStore, DiskStore, MemoryStore
from ragcache.store.tiers.base import Tier
from tests.store.samples import ONE, TWO, make_kv


def _remote(path: Path) -> ChunkStore:
    pytest.importorskip("obstore")
    from tests.store.remotes import over

    return over(path / "store")


STORES: dict[str, Callable[[Path], ChunkStore]] = {
    "memory": lambda path: MemoryStore(),
    "records": lambda path: DiskStore(path / "store", layout="records"),
    "files": lambda path: DiskStore(path / "store", layout="files"),
    "remote": _remote,
    "tier": lambda path: Tier(DiskStore(path / "store", layout="records")),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    """One store of every kind, empty."""
    with STORES[request.param](tmp_path) as store:
        yield store


@pytest.fixture
def reference() -> Iterator[MemoryStore]:
    """What ``store`` has to equal after the same calls."""
    with MemoryStore() as store:
        yield store


@pytest.fixture(params=["records", "files"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskStore]:
    """A store on disk of either layout, empty."""
    with DiskStore(tmp_path / "store", layout=request.param) as store:
        yield store


@pytest.fixture
def two(disk: DiskStore) -> DiskStore:
    """A store of two chunks."""
    for key in (ONE, TWO):
        disk.put(key, make_kv(key))
    return disk
