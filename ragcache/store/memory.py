"""A store in memory: the reference that every other store is tested against."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ragcache.errors import StoreError
from ragcache.store.base import (
    ABSENT,
    ChunkStore,
    HitCounter,
    Miss,
    StoredChunk,
    StoreStats,
    Variant,
    VariantStore,
    check_layer,
    stale_miss,
    unusable_error,
)
from ragcache.store.format.record import check_kv, check_notes
from ragcache.store.lmdb.tables import MemoryTables
from ragcache.types import ChunkKV, ChunkNotes, KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.store.key import ChunkKey
    from ragcache.store.lmdb.tables import Transaction

__all__ = ["MemoryStore"]


class MemoryStore(ChunkStore):
    """Chunks in a dict, copied when they are put and read. Lost on close.

    Misses are *absent* or *stale*. A catalog can share ``tables``.
    """

    def __init__(self) -> None:
        self.tables = MemoryTables()
        self._chunks: dict[bytes, tuple[StoredChunk, ChunkKV]] = {}
        self._puts = 0
        self._notes: dict[bytes, tuple[ChunkNotes, float]] = {}
        self._lock = threading.Lock()
        self.variants = _MemoryVariants(self)
        self._hits = HitCounter()
        self._closed = False

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        self._put(key, kv, None)

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        self._check_open()
        with self._lock:
            stored, _ = self._chunks.get(key.digest, (None, None))
        found = stored or self._absent(key)
        return self._hits.count(found) if count else found

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        self._check_open()
        with self._lock:
            _, kv = self._chunks.get(key.digest, (None, None))
        if kv is None:
            miss = self._absent(key)
            self._hits.count(miss)
            raise unusable_error(key, layer, miss)
        check_layer(layer, len(kv.keys))
        return _clone(kv.keys[layer]), _clone(kv.values[layer])

    def delete(self, key: ChunkKey) -> bool:
        self._check_open()
        with self._lock:
            self._notes.pop(key.digest, None)
            return self._chunks.pop(key.digest, None) is not None

    @contextmanager
    def change(self) -> Iterator[_MemoryChange]:
        self._check_open()
        with self.tables.write() as txn:
            with self._lock:
                contents = {d: stored.key.content for d, (stored, _) in self._chunks.items()}
            change = _MemoryChange(txn, contents)
            yield change
        with self._lock:
            for digest in change.gone:
                self._chunks.pop(digest, None)
                self._notes.pop(digest, None)

    def keys(self) -> Iterator[bytes]:
        self._check_open()
        with self._lock:
            return iter(sorted(self._chunks))

    def stats(self) -> StoreStats:
        self._check_open()
        with self._lock:
            chunks = list(self._chunks.values())
        built_bytes = Counter[str]()
        for stored, _ in chunks:
            built_bytes[str(stored.key.fingerprint)] += stored.payload_bytes
        return StoreStats(
            len(chunks),
            sum(stored.payload_bytes for stored, _ in chunks),
            *self._hits.snapshot(),
            dict(Counter(str(stored.key.fingerprint) for stored, _ in chunks)),
            fingerprint_bytes=dict(built_bytes),
        )

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        self._check_open()
        return {}

    def close(self) -> None:
        self._closed = True
        self.tables.close()
        self._chunks.clear()
        self._notes.clear()

    def _put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None) -> None:
        self._check_open()
        check_kv(key, kv)
        copy = replace(kv, keys=tuple(map(_clone, kv.keys)), values=tuple(map(_clone, kv.values)))
        with self._lock:
            self._puts += 1
            sizes = (kv.spec.layer_bytes(len(kv.tokens)),) * kv.spec.layers
            stored = StoredChunk(key, kv.spec, len(kv.tokens), sizes, kv.sensitivity, self._puts)
            self._chunks[key.digest] = (stored, copy)
            self._notes.pop(key.digest, None)
            if notes is not None:
                self._notes[key.digest] = (notes, 0.0)

    def _absent(self, key: ChunkKey) -> Miss:
        with self._lock:
            every = [stored.key for stored, _ in self._chunks.values()]
        # ``key`` itself may have been put since it was looked for
        same = [k for k in every if k.content == key.content and k.digest != key.digest]
        if not same:
            return ABSENT
        first = min(same, key=lambda other: other.digest)
        return stale_miss(key, str(first.fingerprint), first.mode)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed: open it again")


class _MemoryVariants(VariantStore):
    """The variants of a store in memory."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes) -> None:
        check_notes(key, kv, notes)
        self._store._put(key, kv, notes)

    def find(self, key: ChunkKey) -> list[Variant]:
        self._store._check_open()
        with self._store._lock:
            chunks, every = self._store._chunks, self._store._notes.items()
            noted = [Variant(chunks[digest][0], *notes) for digest, notes in every]
        found = [
            variant
            for variant in noted
            if variant.stored.key.fingerprint == key.fingerprint
            and variant.stored.key.content == key.content
        ]
        return sorted(found, key=lambda variant: variant.stored.key.digest)

    def add_score(self, scores: Mapping[ChunkKey, float]) -> None:
        self._store._check_open()
        with self._store._lock:
            known = self._store._notes
            for key, score in scores.items():
                if key.digest in known:
                    notes, before = known[key.digest]
                    known[key.digest] = (notes, before + score)


class _MemoryChange:
    """A :class:`Change` of a store in memory. ``contents``: content digests by key digest."""

    def __init__(self, txn: Transaction, contents: dict[bytes, bytes]) -> None:
        self.txn = txn
        self.gone: list[bytes] = []
        self._contents = contents

    def delete(self, digest: bytes) -> bool:
        self.gone.append(digest)
        return self._contents.pop(digest, None) is not None

    def delete_content(self, content: bytes) -> int:
        return sum(map(self.delete, [d for d, c in self._contents.items() if c == content]))


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
