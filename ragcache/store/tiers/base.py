"""The base of tiers: a store in front of another, to which it forwards every call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ragcache.store.base import Change, ChunkStore, Miss, StoredChunk, StoreDescription, StoreStats
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.store.key import ChunkKey
    from ragcache.store.remote.bandwidth import LinkEstimate
    from ragcache.types import ChunkKV

__all__ = ["Tier"]


class Tier(ChunkStore):
    """Forwards every call to ``below``.

    Subclasses override what they do differently; their results must equal those of the store below.
    Closing a tier closes ``below``.
    """

    def __init__(self, below: ChunkStore) -> None:
        self.below = below
        self.remote_codecs, self.variants = below.remote_codecs, below.variants

    @property
    def description(self) -> StoreDescription:
        return self.below.description

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        self.below.put(key, kv)

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        self.below.put_all(chunks)

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        return self.below.get_header(key, count=count)

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        return self.below.get_headers(keys, count=count)

    def has(self, key: ChunkKey) -> bool:
        return self.below.has(key)

    def missing(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        return self.below.missing(keys)

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        return self.below.layer(key, layer)

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        return self.below.layers(chunks, layer)

    def alternatives(self, chunks: Sequence[StoredChunk]) -> list[tuple[StoredChunk, ...]]:
        return self.below.alternatives(chunks)

    def link(self, probe: StoredChunk) -> LinkEstimate | None:
        return self.below.link(probe)

    def refusal(self) -> str | None:
        return self.below.refusal()

    def lease(self, keys: Iterable[ChunkKey]) -> AbstractContextManager[None]:
        return self.below.lease(keys)

    def delete(self, key: ChunkKey) -> bool:
        return self.below.delete(key)

    def change(self) -> AbstractContextManager[Change]:
        return self.below.change()

    def keys(self) -> Iterator[bytes]:
        return self.below.keys()

    def stats(self) -> StoreStats:
        return self.below.stats()

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        return self.below.verify(repair=repair)

    def close(self) -> None:
        self.below.close()

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, from below, which can read all layers in one transaction."""
        return self.below.get(key)
