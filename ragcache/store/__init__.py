"""Stores for the KV of chunks, and the catalog of indexed documents.

A :class:`ChunkStore` maps a :class:`ChunkKey` to KV; a :class:`LayerReader` streams it.
"""

from ragcache.store.base import ChunkStore, Miss, StoredChunk, StoreStats
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.store.prefetch import LayerReader

__all__ = [
    "Catalog",
    "ChunkKey",
    "ChunkStore",
    "LayerReader",
    "DiskStore",
    "MemoryStore",
    "Miss",
    "StoredChunk",
    "StoreStats",
]
