"""A tier that holds what cannot be written to the store below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ragcache.store.base import ChunkStore, Miss, StoredChunk
from ragcache.store.memory import MemoryStore
from ragcache.store.tiers.base import Tier
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV

__all__ = ["OverlayStore"]


class OverlayStore(Tier):
    """``below``, which another process writes: chunks that are put stay in memory, and are found
    there first."""

    def __init__(self, below: ChunkStore) -> None:
        super().__init__(below)
        self._put = MemoryStore()

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        self._put.put(key, kv)

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        self._put.put_all(chunks)

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        store = self._put if self._put.has(key) else self.below
        return store.get_header(key, count=count)

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        left = [key for key in keys if not self._put.has(key)]
        below = iter(self.below.get_headers(left, count=count))
        return [
            self._put.get_header(key, count=count) if self._put.has(key) else next(below)
            for key in keys
        ]

    def has(self, key: ChunkKey) -> bool:
        return self._put.has(key) or self.below.has(key)

    def missing(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        return self.below.missing([key for key in keys if not self._put.has(key)])

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        store = self._put if self._put.has(key) else self.below
        return store.layer(key, layer)

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        left = [chunk for chunk in chunks if not self._put.has(chunk.key)]
        below = iter(self.below.layers(left, layer) if left else ())
        return [
            self._put.layer(chunk.key, layer) if self._put.has(chunk.key) else next(below)
            for chunk in chunks
        ]

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        return self._put.get(key) if self._put.has(key) else self.below.get(key)
