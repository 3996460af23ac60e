"""The contract tests for every store: the same calls as to the one in memory, the same values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ragcache.store import ChunkKey, ChunkStore, DiskStore, MemoryStore
from ragcache.store.tiers.base import Tier
from ragcache.store.tiers.ram import RamTier
from ragcache.testing.store import ChunkStoreTests
from tests.store.samples import CHUNK_BYTES, rewrite_layer


class TestMemoryStore(ChunkStoreTests):
    durable = False

    def open(self, path: Path) -> ChunkStore:
        return MemoryStore()


class OnDisk(ChunkStoreTests):
    """With a DiskStore at the bottom, whose bytes can be changed."""

    def damage(self, store: ChunkStore, key: ChunkKey, layer: int) -> None:
        while isinstance(store, Tier):
            store = store.below
        assert isinstance(store, DiskStore)
        rewrite_layer(store, key, layer, lambda raw: raw[::-1])


class TestRecords(OnDisk):
    def open(self, path: Path) -> ChunkStore:
        return DiskStore(path / "store", layout="records")


class TestFiles(OnDisk):
    def open(self, path: Path) -> ChunkStore:
        return DiskStore(path / "store", layout="files")


class TestTier(OnDisk):
    def open(self, path: Path) -> ChunkStore:
        return Tier(DiskStore(path / "store", layout="records"))


class TestRamTier(OnDisk):
    def open(self, path: Path) -> ChunkStore:
        return RamTier(DiskStore(path / "store"), 1 << 20)


class ByLayer(RamTier):
    """Reads whole chunks through RAM too, layer by layer."""

    get = ChunkStore.get


class TestRamTierByLayer(OnDisk):
    def open(self, path: Path) -> ChunkStore:
        return ByLayer(DiskStore(path / "store"), 1 << 20)


class TestRamTierOverMemory(ChunkStoreTests):
    """All of it fits, two chunks do, or none does."""

    durable = False

    @pytest.fixture(params=[1 << 20, 2 * CHUNK_BYTES, 0])
    def store(self, request: pytest.FixtureRequest) -> Iterator[ChunkStore]:
        with ByLayer(MemoryStore(), request.param) as store:
            yield store
