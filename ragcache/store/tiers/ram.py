"""The RAM tier: holds decoded layers, so that chunks in use are not read and checked again.

It admits and evicts whole chunks, the least recently used first. A prompt reads all layers of its
chunks, layer by layer across the chunks, so half a chunk is useless to the next prompt, and single
layers would evict each other before they are needed. So space for all of a chunk is reserved when
its first layer is read, and at no other time: where a prompt's chunks do not fit together, those
that were evicted are read from below to the end. A chunk of more than ``max_bytes`` is never held.

The store below is authoritative: a chunk is held under the :class:`StoredChunk` that was found
there before its layers were read, and is returned only to callers who found the same one. Where the
record is gone or was replaced, the chunk is dropped.

:meth:`RamTier.layers` returns the tensors that are held; :meth:`RamTier.layer` returns copies,
since torch has no read-only tensors. Copies reuse memory: new memory from the system, zeroed page
by page, takes longer than the copy. For a GPU, what is held is in pinned memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError, StoreError
from ragcache.store.base import ChunkStore, Miss, StoredChunk, StoreDescription, check_layer
from ragcache.store.tiers.base import Tier
from ragcache.types import KVPair
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV

__all__ = ["RamTier"]


@dataclass(frozen=True, slots=True)
class RamStats:
    """Counts since the tier was made, and its contents now."""

    hits: int  # layers that came from RAM
    misses: int  # layers that had to be read below
    evictions: int  # chunks
    held_bytes: int  # of layers, without the space reserved for layers not read yet


class RamTier(Tier):
    """``below``, with up to ``max_bytes`` of decoded layers in RAM.

    ``pin``: hold page-locked memory, from which a GPU copies faster and in the background. Copies
    in use, and :data:`SPARE_BYTES` for new ones, come on top of ``max_bytes``. Raises ConfigError
    where there is no GPU to pin for, or ``max_bytes`` is negative. Closing it closes ``below``.

    Changes below, by this process or another, are noticed when a header is read.
    """

    def __init__(self, below: ChunkStore, max_bytes: int, *, pin: bool = False) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes}: it must be 0 (hold nothing) or more")
        super().__init__(below)
        self.max_bytes = max_bytes
        self._room = _Room(max_bytes)
        self._blocks = BufferPool(SPARE_BYTES)
        self._held = BufferPool(0, pin=pin)

    @property
    def ram(self) -> RamStats:
        return self._room.stats()

    @property
    def description(self) -> StoreDescription:
        return replace(self.below.description, ram_bytes=self.max_bytes)

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        try:
            self.below.put(key, kv)
        finally:
            self._room.drop(key.digest)

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        given = list(chunks)
        try:
            self.below.put_all(given)
        finally:
            for key, _ in given:
                self._room.drop(key.digest)

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        return self._without(key, self.below.get_header(key, count=count))

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        return list(map(self._without, keys, self.below.get_headers(keys, count=count)))

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        found = self.get_header(key, count=False)
        if isinstance(found, Miss):
            pair = self.below.layer(
                key, layer
            )  # raises and counts the miss, unless it was put since
            self._room.missed()
            return pair
        check_layer(layer, found.spec.layers)
        keys, values = self.layers([found], layer)[0]
        both = self._blocks.tensor((2, *keys.shape), keys.dtype)
        both[0], both[1] = keys, values
        return both[0], both[1]

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        taken = [self._room.take(chunk, layer) for chunk in chunks]
        missing = [one for one, (_, held) in zip(chunks, taken, strict=True) if held is None]
        try:
            read = iter(self.below.layers(missing, layer) if missing else ())
        except StoreError:
            for chunk in missing:
                self._room.drop(chunk.key.digest)
            raise
        return [
            (held[0], held[1]) if held is not None else self._entered(place, layer, next(read))
            for place, held in taken
        ]

    def delete(self, key: ChunkKey) -> bool:
        try:
            return self.below.delete(key)
        finally:
            self._room.drop(key.digest)

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        wrong = self.below.verify(repair=repair)
        for digest in wrong:
            self._room.drop(bytes.fromhex(digest))
        return wrong

    def close(self) -> None:
        self.below.close()
        self._room.clear()
        self._blocks.clear()

    def _without(self, key: ChunkKey, found: StoredChunk | Miss) -> StoredChunk | Miss:
        """What was found below. Drops what is gone there; what is held here is not remote."""
        if isinstance(found, Miss):
            self._room.drop(key.digest)
        elif found.is_remote and self._room.holds(found):
            return replace(found, is_remote=False)
        return found

    def _entered(self, chunk: _Held | None, layer: int, pair: KVPair) -> KVPair:
        """A layer that was read from below, and is held from now on where space is reserved."""
        if chunk is None:
            return pair
        both = self._held.tensor((2, *pair[0].shape), pair[0].dtype)
        both[0], both[1] = pair
        self._room.fill(chunk, layer, both)
        return both[0], both[1]


@dataclass(eq=False, slots=True)
class _Held:
    """The layers of one record that were read so far, with space reserved for the rest."""

    stored: StoredChunk
    layers: dict[int, Tensor] = field(default_factory=dict)  # (2, kv_heads, tokens, head_dim)

    @property
    def room(self) -> int:
        return self.stored.spec.chunk_bytes(self.stored.tokens)

    @property
    def held_bytes(self) -> int:
        return self.stored.layer_bytes * len(self.layers)


class _Room:
    """The chunks with reserved space, in the order of their last use. Thread-safe.

    Held tensors are never written to, so that they can be copied without the lock.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self._used = 0  # bytes reserved for all chunks
        self._chunks: OrderedDict[bytes, _Held] = OrderedDict()
        self._hits = self._misses = self._evictions = 0

    def take(self, stored: StoredChunk, layer: int) -> tuple[_Held | None, Tensor | None]:
        """The chunk, if space is reserved, and the layer, if it is held. Counts a hit or a miss."""
        digest = stored.key.digest
        with self._lock:
            chunk = self._chunks.get(digest)
            if chunk is not None and chunk.stored != stored:
                self._remove(digest)
                chunk = None
            if chunk is None and layer == 0:
                chunk = self._enter(stored)
            if chunk is None:
                self._misses += 1
                return None, None
            self._chunks.move_to_end(digest)
            held = chunk.layers.get(layer)
            self._hits += held is not None
            self._misses += held is None
            return chunk, held

    def holds(self, stored: StoredChunk) -> bool:
        """Whether all layers of a record are held."""
        with self._lock:
            chunk = self._chunks.get(stored.key.digest)
            if chunk is None or chunk.stored != stored:
                return False
            return len(chunk.layers) == stored.spec.layers

    def fill(self, chunk: _Held, layer: int, both: Tensor) -> None:
        """Hold a layer, unless its size differs from the reserved one: the record was replaced.

        A chunk that was evicted since :meth:`take` is not found any more.
        """
        with self._lock:
            if both.nbytes == chunk.stored.layer_bytes:
                chunk.layers[layer] = both

    def missed(self) -> None:
        """Count a layer that was read below without :meth:`take`."""
        with self._lock:
            self._misses += 1

    def drop(self, digest: bytes) -> None:
        with self._lock:
            self._remove(digest)

    def clear(self) -> None:
        with self._lock:
            self._chunks.clear()
            self._used = 0

    def stats(self) -> RamStats:
        with self._lock:
            held = sum(chunk.held_bytes for chunk in self._chunks.values())
            return RamStats(self._hits, self._misses, self._evictions, held)

    def _enter(self, stored: StoredChunk) -> _Held | None:
        chunk = _Held(stored)
        if chunk.room > self._max_bytes:
            return None
        while self._used + chunk.room > self._max_bytes:
            self._remove(next(iter(self._chunks)))
            self._evictions += 1
        self._chunks[stored.key.digest] = chunk
        self._used += chunk.room
        return chunk

    def _remove(self, digest: bytes) -> None:
        chunk = self._chunks.pop(digest, None)
        if chunk is not None:
            self._used -= chunk.room
