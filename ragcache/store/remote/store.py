"""A store that machines share: a store on disk in front of an object store, the remote.

What a machine reads or computes is stored on its own disk, up to a quota; other chunks are read
from the remote, layer by layer, and stored on disk too. Only KV is shared, by its key, which names
everything that KV depends on; documents and all other tables stay on each machine.

*Read-through.* A chunk that is read under a lease, as by every :class:`LayerReader`, is written to
disk in the background (read_through.py).

*Write-back.* A put is durable on the disk here when it returns, and is added to the outbox in the
same commit (outbox.py). It is sent in the background, by this process or the next (write_back.py),
and not evicted before. Where the disk is full, a put is durable in the remote when it returns. A
deletion takes effect here at once, and in the remote in the same way as a put.

*Faults.* If the remote is down, its chunks are misses, *unreadable*, and answers go on. A chunk
that is damaged here is dropped and read from the remote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from ragcache.errors import FullError, LockedError, StoreError
from ragcache.store.base import (
    ABSENT,
    Change,
    ChunkStore,
    HitCounter,
    Miss,
    StoredChunk,
    StoreDescription,
    StoreStats,
    check_layer,
    unusable_error,
)
from ragcache.store.disk import outbox
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import codec
from ragcache.store.format.header import Header, decode_layer
from ragcache.store.format.record import encode_chunk
from ragcache.store.key import with_codec
from ragcache.store.remote.bandwidth import LinkEstimate
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.counts import EventCounts
from ragcache.store.remote.object_store import Bucket
from ragcache.store.remote.read_through import ReadThrough
from ragcache.store.remote.write_back import WriteBack
from ragcache.types import ChunkKV, KVPair
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey
    from ragcache.store.lmdb.tables import Tables
    from ragcache.types import MissReason

__all__ = ["RemoteStore", "RemoteTraffic", "open_remote"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteTraffic:
    """Counts since the store was opened; ``waiting``: pending writes now."""

    url: str
    waiting: int
    read_bytes: int  # of layers that came from the remote
    kept: int  # chunks read from the remote that were stored on disk
    not_kept: int  # no space, unusable, or another process is the writer
    healed: int  # chunks damaged here that were read from the remote
    sent: int  # chunks written to the remote
    unsent: int  # chunks that cannot be sent: `ragcache push` says why
    requests: int
    retries: int
    failed: int  # operations, after all retries
    refused: int  # operations that were not tried, shortly after a failure


class RemoteStore(ChunkStore):
    """``disk``, and behind it a remote that other machines read and write too.

    ``keys``, ``stats`` except hits and misses, ``variants``, ``change`` and ``verify`` cover the
    disk only. ``remote_codecs``: codecs in which copies of chunks are sent and can be read besides
    their own, the least lossy first. ``pin`` as for DiskStore. Closing it closes ``disk``, after it
    has sent pending writes for up to ``patience_s`` seconds; what is left is sent when the store is
    next opened.
    """

    def __init__(
        self,
        disk: DiskStore,
        objects: ChunkObjects,
        *,
        remote_codecs: Sequence[str] = (),
        pin: bool = False,
        patience_s: float = 30.0,
    ) -> None:
        for name in remote_codecs:
            codec(name)  # raises ConfigError
        self.disk, self.objects, self.remote_codecs = disk, objects, tuple(remote_codecs)
        disk.outbox_codecs = self.remote_codecs
        self.variants = disk.variants  # they stay on this machine
        self._patience_s = patience_s
        self._hits, self._counts = HitCounter(), EventCounts()
        self._blocks = BufferPool(SPARE_BYTES, pin=pin)
        self._read_through = ReadThrough(disk, objects)
        self._pool = self._read_through.pool
        self.write_back = WriteBack(disk, objects)

    @property
    def tables(self) -> Tables:
        """The tables on this machine, which a catalog can share."""
        return self.disk.tables

    @property
    def description(self) -> StoreDescription:
        return self.disk.description

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        try:
            self.disk.put(key, kv)
        except FullError:
            self._put_there(key, kv)
        else:
            self.write_back.wake()

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        given = list(chunks)
        try:
            self.disk.put_all(given)
        except FullError:
            super().put_all(given)
        else:
            self.write_back.wake()

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        found = self._get_header(key)
        if isinstance(found, Miss):
            found = self._explained(key, found)
        elif count and not found.is_remote:
            self.disk.get_header(key)  # the disk evicts by its own uses
        return self._hits.count(found) if count else found

    def get_headers(
        self, keys: Sequence[ChunkKey], *, count: bool = True
    ) -> list[StoredChunk | Miss]:
        return list(self._pool.map(partial(self.get_header, count=count), keys))

    def has(self, key: ChunkKey) -> bool:
        return not isinstance(self._get_header(key), Miss)

    def missing(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        there = self._pool.map(self.has, keys)
        return [key for key, has in zip(keys, there, strict=True) if not has]

    def alternatives(self, chunks: Sequence[StoredChunk]) -> list[tuple[StoredChunk, ...]]:
        keys = [with_codec(c.key, n) for c in chunks if c.is_remote for n in self.remote_codecs]
        found = iter(self._pool.map(self._get_header, keys))
        every = [[next(found) for _ in self.remote_codecs] if c.is_remote else [] for c in chunks]
        return [tuple(one for one in each if isinstance(one, StoredChunk)) for each in every]

    def link(self, probe: StoredChunk) -> LinkEstimate | None:
        if self.objects.meter.link is None:
            self.objects.layer(probe.key, 0)
        return self.objects.meter.link

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        here = self._here(key, layer)
        if not isinstance(here, Miss):
            return here
        found = self._range(key, layer)
        if isinstance(found, Miss):
            found = self._explained(key, self._less(here, found))
        else:
            self._heal(key, here)
        return self._decoded(key, layer, found)

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        asked = [
            self._pool.submit(self._range, c.key, layer) if c.is_remote else None for c in chunks
        ]
        here = [c for c in chunks if not c.is_remote]
        try:
            try:
                local = iter(self.disk.layers(here, layer) if here else [])
            except StoreError:  # the one that is damaged or gone, at least
                local = iter([self.layer(c.key, layer) for c in here])
            return [
                next(local) if future is None else self._settled(chunk.key, layer, future.result())
                for chunk, future in zip(chunks, asked, strict=True)
            ]
        finally:
            for future in asked:
                if future is not None:
                    future.cancel()

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, every layer checked. Stores a remote one on disk, if there is space."""
        here = self.disk.get(key)
        if isinstance(here, ChunkKV):
            return self._hits.count(here)
        found = self.get_header(key, count=False)
        if isinstance(found, Miss):
            return self._hits.count(found)
        record = self._read_through.layers(key, range(found.spec.layers))
        if isinstance(record, Miss):
            return self._hits.count(self._less(here, record))
        self._heal(key, here)
        self._read_through.cache(record)
        parts = [(record.header, raw) for raw in record.raws]
        try:
            pairs = [self._decoded(key, layer, part) for layer, part in enumerate(parts)]
        except StoreError as error:
            return Miss(cast("MissReason", error.reason), str(error))
        keys, values = zip(*pairs, strict=True)
        self._hits.count(found)
        return ChunkKV(key.tokens, keys, values, record.header.sensitivity)

    def lease(self, keys: Iterable[ChunkKey]) -> AbstractContextManager[None]:
        return self._read_through.lease(keys)

    def delete(self, key: ChunkKey) -> bool:
        there = self.has(key)
        self.disk.delete(key)
        self.objects.uncache(key.digest)
        self.write_back.wake()
        return there

    def change(self) -> AbstractContextManager[Change]:
        return self.disk.change()

    def keys(self) -> Iterator[bytes]:
        return self.disk.keys()

    def stats(self) -> StoreStats:
        hits, misses = self._hits.snapshot()
        return replace(self.disk.stats(), hits=hits, misses=misses)

    @property
    def traffic(self) -> RemoteTraffic:
        """Counts of what was sent to the remote and read from it."""
        counts = self._read_through.counts + self.write_back.counts + self.objects.bucket.counts
        counts += self._counts.snapshot()
        names = RemoteTraffic.__dataclass_fields__.keys() - {"url", "waiting"}
        figures = {name: counts[name] for name in names}
        return RemoteTraffic(self.objects.bucket.url, self.disk.pending_writes, **figures)

    def flush(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Write what was read to disk, and send all pending writes. ``progress`` is called with
        (done, total).

        Raises RemoteError where they cannot be sent; they are sent later.
        """
        self._read_through.flush()
        self.write_back.flush(progress)

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        return self.disk.verify(repair=repair)

    def refusal(self) -> str | None:
        return self.disk.refusal()

    def close(self) -> None:
        with ExitStack() as every:  # closes all, even if one of them raises
            every.callback(self._blocks.clear)
            every.callback(self.disk.close)
            every.callback(self.write_back.close, self._patience_s)
            every.callback(self._read_through.close)

    def _get_header(self, key: ChunkKey) -> StoredChunk | Miss:
        """The header from disk, or else from the remote. A miss gets its reason from the disk
        only."""
        here = self.disk.get_header(key, count=False)
        if isinstance(here, StoredChunk):
            return here
        if self._is_gone(key.content, key.digest):
            return here
        seen = self.objects.get_header(key)
        if not isinstance(seen, Miss):
            return seen.stored(key)
        return self._less(here, seen)

    def _here(self, key: ChunkKey, layer: int) -> KVPair | Miss:
        """A layer from the disk."""
        found = self.disk.get_header(key, count=False)
        if isinstance(found, Miss):
            return found
        check_layer(layer, found.spec.layers)
        try:
            return self.disk.layer(key, layer)
        except StoreError as error:
            if error.reason is None:
                raise
            detail = f"layer {layer} is damaged here, and not in the remote"
            return Miss(cast("MissReason", error.reason), detail)

    def _explained(self, key: ChunkKey, miss: Miss) -> Miss:
        """*Stale* and not *absent*, where the remote has these tokens under another key."""
        if miss != ABSENT:
            return miss
        hidden = partial(self._is_gone, key.content)
        return self.objects.others(key, hidden) or miss

    def _less(self, here: Miss, there: Miss) -> Miss:
        """The more specific of the misses of the disk and the remote."""
        return there if here.reason == "absent" else here

    def _heal(self, key: ChunkKey, here: Miss) -> None:
        """Drop a damaged record here of a chunk that the remote has."""
        if here.reason in ("corrupt", "truncated", "foreign"):
            logger.warning(
                "chunk %s is %s here, and is read from the remote",
                key.digest.hex()[:12],
                here.reason,
            )
            with suppress(LockedError):  # the writer will find it too
                self.disk.drop_local(key.digest)
                self._counts.add("healed")

    def _put_there(self, key: ChunkKey, kv: ChunkKV) -> None:
        """Put a chunk into the remote, where the disk is full."""
        if self._is_gone(key.content, key.digest):  # its deletion must be sent before
            self.write_back.flush()
        for each in (key, *(with_codec(key, name) for name in self.remote_codecs)):
            self.objects.put(encode_chunk(each, kv), replacing=True)
        self.disk.drop_local(key.digest)

    def _is_gone(self, content: bytes, digest: bytes) -> bool:
        """Whether a chunk was deleted, while the remote may still have it."""
        with self.disk.tables.read() as txn:
            return outbox.is_deleted(txn, content, digest)

    def _range(self, key: ChunkKey, layer: int) -> tuple[Header, Bytes] | Miss:
        """The bytes that hold a layer, from the remote, as stored there."""
        if self._is_gone(key.content, key.digest):
            return Miss("absent", "it was deleted")
        coded = codec(key.codec)
        held = coded.payload_of(layer)
        return self._read_through.layer(key, held, again=coded.payload_of(held + 1) == held)

    def _settled(self, key: ChunkKey, layer: int, found: tuple[Header, Bytes] | Miss) -> KVPair:
        """Decode a layer from the remote; where it was a miss, it may be on disk by now."""
        if isinstance(found, Miss) and self.disk.has(key):
            return self.layer(key, layer)
        return self._decoded(key, layer, found)

    def _decoded(self, key: ChunkKey, layer: int, found: tuple[Header, Bytes] | Miss) -> KVPair:
        if not isinstance(found, Miss):
            header, raw = found
            own = self._blocks.empty(len(raw))  # decoding needs memory that nothing else writes to
            own[:] = raw
            pair = decode_layer(header, layer, own)
            if not isinstance(pair, Miss):
                return pair
            found = pair
        raise unusable_error(key, layer, self._hits.count(found))


def open_remote(
    disk: DiskStore, url: str, remote_codecs: Sequence[str] = (), *, pin: bool = False
) -> RemoteStore:
    """``disk`` in front of the remote at ``url`` (see :class:`Bucket`).

    Raises ConfigError for an invalid URL or codec.
    """
    return RemoteStore(disk, ChunkObjects(Bucket(url)), remote_codecs=remote_codecs, pin=pin)
