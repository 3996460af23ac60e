"""The contract of a chunk store: what it stores, and what callers can rely on.

A chunk is stored whole or not at all. A record that is corrupt, stale, foreign or truncated is a
miss with a counted reason: a store never returns KV other than what was put under the key.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self, TypeVar, cast

from ragcache.errors import StoreError
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.store.key import ChunkKey
    from ragcache.store.lmdb.tables import Transaction
    from ragcache.store.remote.bandwidth import LinkEstimate
    from ragcache.types import ChunkKV, ChunkNotes, Fingerprint, KVSpec, MissReason

__all__ = ["ABSENT", "ChunkStore", "Miss", "StoreStats", "StoredChunk", "Variant", "unusable_error"]

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A record whose header was read and is valid. Its layers are checked when they are read."""

    key: ChunkKey
    spec: KVSpec
    tokens: int
    layer_sizes: tuple[int, ...]  # bytes of each layer as stored
    sensitivity: tuple[float, ...] = ()  # as put with the chunk
    version: int = 0  # differs for every put: equal versions are the same record
    is_remote: bool = field(default=False, compare=False)  # read over a network
    origin: object = field(default=None, compare=False, repr=False)  # private to the store

    @property
    def codec(self) -> str:
        return self.key.codec

    @property
    def payload_bytes(self) -> int:
        """Bytes of all layers as stored."""
        return sum(self.layer_sizes)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's keys and values in memory."""
        return self.spec.layer_bytes(self.tokens)


@dataclass(frozen=True, slots=True)
class Miss:
    """There is no usable record. ``detail`` says why, in a sentence for people."""

    reason: MissReason
    detail: str = ""


#: The miss where no key with the same tokens is stored.
ABSENT = Miss("absent", "these tokens are not stored")
READ_THREADS = 2  # of a LayerReader by default: each reads one layer at a time


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the store was opened, and its contents now."""

    chunks: int
    payload_bytes: int
    hits: int
    misses: Counter[MissReason]
    fingerprints: dict[str, int]  # printable fingerprint -> chunks stored for it
    evictions: int = 0  # chunks evicted since the store was opened
    #: printable fingerprint -> payload bytes of the chunks stored for it
    fingerprint_bytes: dict[str, int] = field(default_factory=dict)

    def usable(self, fingerprint: Fingerprint) -> tuple[int, int]:
        """The number of stored chunks that a model with this fingerprint can use, and of all."""
        mine = str(fingerprint).rpartition("@")[2]
        counts = self.fingerprints.items()
        usable = sum(count for name, count in counts if name.rpartition("@")[2] == mine)
        return usable, sum(self.fingerprints.values())


class HitCounter:
    """Hits and misses since a store was opened. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = 0
        self._misses: Counter[MissReason] = Counter()

    def count(self, found: _Found) -> _Found:
        """Count a Miss under its reason, anything else as a hit, and return it."""
        with self._lock:
            if isinstance(found, Miss):
                self._misses[found.reason] += 1
            else:
                self._hits += 1
        return found

    def snapshot(self) -> tuple[int, Counter[MissReason]]:
        """Hits, and misses by reason."""
        with self._lock:
            return self._hits, self._misses.copy()


def stale_miss(key: ChunkKey, fingerprint: str, mode: str) -> Miss:
    """The miss for ``key`` where the same tokens are stored for another model, mode or prefix:
    under ``fingerprint`` (printable) and ``mode``."""
    wanted = str(key.fingerprint)
    if fingerprint != wanted:
        return Miss("stale", f"these tokens are stored for {fingerprint}, asked for {wanted}")
    if mode != key.mode:
        return Miss("stale", f"these tokens are stored in mode {mode}, asked for mode {key.mode}")
    return Miss("stale", f"these tokens are stored for {wanted}, but behind another prefix")


def unusable_error(key: ChunkKey, layer: int, miss: Miss) -> StoreError:
    """The StoreError for a record that cannot be used, found out while reading a layer."""
    return StoreError(
        f"layer {layer} of chunk {key.digest.hex()[:12]} is {miss.reason}: {miss.detail}. "
        "Count it as a miss and compute the chunk again.",
        key=key.digest,
        reason=miss.reason,
    )


def check_layer(layer: int, layers: int) -> None:
    """Raise ValueError where a chunk of ``layers`` layers has no layer ``layer``."""
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} of a chunk that has layers 0 to {layers - 1}")


class Change(Protocol):
    """One commit over chunks and the other tables of a store: all or nothing."""

    @property
    def txn(self) -> Transaction: ...

    def delete(self, digest: bytes) -> bool:
        """Delete a chunk by its key digest; True if it was there."""

    def delete_content(self, content: bytes) -> int:
        """Delete all KV of the same tokens, of every model, mode and variant; return the number of
        chunks deleted. ``content`` is :attr:`ChunkKey.content`.
        """


@dataclass(frozen=True, slots=True)
class Variant:
    """KV of a chunk that was cut from a prompt, with notes on its attention there."""

    stored: StoredChunk
    notes: ChunkNotes
    score: float  # sum of what its uses were worth, see ``VariantStore.add_score``


class VariantStore(ABC):
    """Variants: several KV of one chunk, each cut from another prompt. Thread-safe.

    A variant is also a chunk of the :class:`ChunkStore` it belongs to, which reads and deletes it;
    putting a chunk there under the same key replaces it. Cache-Craft (arXiv:2502.15734) chooses
    among variants by their notes.
    """

    @abstractmethod
    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes) -> None:
        """As :meth:`ChunkStore.put`, with notes and a score of 0. ``key`` is a ``variant_key``.

        Raises ValueError also for notes on another number of tokens.
        """

    @abstractmethod
    def find(self, key: ChunkKey) -> list[Variant]:
        """The variants with the tokens, model and tenant of ``key``, in the order of their digests.

        The chunks before ``key`` do not matter. A damaged variant is left out.
        """

    @abstractmethod
    def add_score(self, scores: Mapping[ChunkKey, float]) -> None:
        """Add to the scores of variants. Variants that no longer exist are skipped."""


class NoVariants(VariantStore):
    """For stores without variants: drops what is put and finds nothing."""

    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes) -> None:
        return

    def find(self, key: ChunkKey) -> list[Variant]:
        return []

    def add_score(self, scores: Mapping[ChunkKey, float]) -> None:
        return


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """What the speed of reading from a store depends on. Measurements apply to equal ones."""

    kind: str  # class name of the store that reads from this machine
    layout: str = ""  # of its files on disk
    ram_bytes: int = 0  # capacity of the RAM tier in front of it


class ChunkStore(ABC):
    """Maps keys to KV. Thread-safe; one writer process, any number of readers."""

    #: Codecs in which a remote holds copies of a chunk besides the store's own, least lossy first.
    remote_codecs: Sequence[str] = ()
    #: The chunks' variants. Only Cache-Craft uses them; a store need not keep any.
    variants: VariantStore = NoVariants()

    @property
    def description(self) -> StoreDescription:
        """Identifies what the speed of reading from this store depends on."""
        return StoreDescription(type(self).__name__)

    @abstractmethod
    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        """Store all layers of a chunk, or none. Replaces what was there. Durable on return.

        Raises ValueError where ``kv`` is not the KV that ``key`` names (other tokens) or cannot be
        stored (no tokens, mixed or unsupported dtypes).
        """

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        """Put every chunk; in one commit, all or none, where the store supports that."""
        for key, kv in chunks:
            self.put(key, kv)

    @abstractmethod
    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        """Read the header of a chunk, without its layers.

        With ``count`` it is a use of the chunk: the hit is counted, or the miss under its reason,
        and a store that evicts takes note of it. Without, nothing changes.
        """

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        """:meth:`get_header` of every key, in order. A store behind a network sends the requests
        concurrently."""
        return [self.get_header(key, count=count) for key in keys]

    def has(self, key: ChunkKey) -> bool:
        """Whether :meth:`get_header` finds the chunk. Counts nothing."""
        return not isinstance(self.get_header(key, count=False), Miss)

    def missing(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """The keys whose chunks are not stored, in order."""
        return [key for key in keys if not self.has(key)]

    @abstractmethod
    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        """Keys (before RoPE) and values of one layer, each (kv_heads, tokens, head_dim).

        The tensors own their memory. Raises StoreError with ``key`` and ``reason`` set, and
        counts the miss, when the record is gone or its checksum does not match; ValueError for
        a layer that the chunk does not have.
        """

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        """:meth:`layer` of every chunk, in order. Read-only: the tensors may belong to the store.

        For a chunk that was replaced or deleted since its header was read, returns the old or the
        new record's layer, or raises StoreError.
        """
        return [self.layer(chunk.key, layer) for chunk in chunks]

    def alternatives(self, chunks: Sequence[StoredChunk]) -> list[tuple[StoredChunk, ...]]:
        """For every chunk, the other records of its KV that can be loaded instead: in lossier
        codecs of fewer bytes, the least lossy first. Counts nothing."""
        return [()] * len(chunks)

    def link(self, probe: StoredChunk) -> LinkEstimate | None:
        """Recent latency and bandwidth of the remote, or those of reading one layer of ``probe``
        now; None for a store without a remote, or where that read fails."""
        return None

    def refusal(self) -> str | None:
        """Why this process cannot write now, such as the lock that another one holds; None where it
        can. Does not wait for the lock."""
        return None

    def lease(self, keys: Iterable[ChunkKey]) -> AbstractContextManager[None]:
        """Keep chunks from being evicted while they are being read, until the context ends."""
        return nullcontext()

    @abstractmethod
    def delete(self, key: ChunkKey) -> bool:
        """Delete a chunk; True if it was there."""

    @abstractmethod
    def change(self) -> AbstractContextManager[Change]:
        """Change chunks and tables in one commit, durable at the end of the context; nothing
        changes if it raises."""

    @abstractmethod
    def keys(self) -> Iterator[bytes]:
        """Digests of all stored chunks, in byte order.

        Chunks that are put or deleted during the iteration may or may not appear.
        """

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts and contents of the whole store."""

    @abstractmethod
    def verify(self, *, repair: bool = False) -> dict[str, str]:
        """Read every record; hex digest -> what is wrong with it. ``repair`` deletes these."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources. Closing twice is allowed; use after closing raises StoreError."""

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, every layer checked."""
        from ragcache.types import ChunkKV

        found = self.get_header(key)
        if isinstance(found, Miss):
            return found
        try:
            pairs = [self.layer(key, layer) for layer in range(found.spec.layers)]
        except StoreError as error:
            if error.reason is None:
                raise
            return Miss(cast("MissReason", error.reason), str(error))
        keys, values = zip(*pairs, strict=True)
        return ChunkKV(key.tokens, keys, values, found.sensitivity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
