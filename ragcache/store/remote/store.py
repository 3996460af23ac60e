"""A store that is shared between machines: a store on disk, and an object store behind it.

What a machine has read or computed lies on its own disk, up to a quota; what is not there is read
from the remote, layer by layer, and kept. Documents, and everything that is known of them, stay
where they are: what is shared is KV, by its key, and a key names everything that KV depends on.

*Reading through.* A chunk that was read while it was held, as every :class:`LayerReader` does, is
written to disk in the background (arrivals.py).

*Writing back.* A put is durable on the disk here when it returns, and is noted for the remote in
the same commit (outbox.py); it is sent in the background, by this process or the next, and not
evicted before (courier.py). Where the disk may hold no more, a put is durable in the remote when it
returns. A deletion takes effect here at once, and in the remote in the same way as a put.

*Faults.* A remote that does not answer is a miss, *unreadable*, and so is nothing that stops an
answer. A chunk that is damaged here is dropped and read from the remote.
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteTraffic:
    """Counts since the store was opened; ``waiting`` is what the remote is still to be told."""

    url: str
    waiting: int
    read_bytes: int  # of layers that came from the remote
    kept: int  # chunks that were read there and are on disk now
    not_kept: int  # those that had no room, or could not be used, or while another process wrote
    healed: int  # chunks that were damaged here and came from the remote
    sent: int  # chunks written there
    unsent: int  # chunks that cannot be sent: `ragcache push` says why
    requests: int
    retries: int
    failed: int  # operations, after all retries
    refused: int  # operations that were not tried, shortly after one that failed


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
        """Where a catalog can live beside the chunks: here."""
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
        """The whole chunk, every layer verified; it is here then, where there is room."""
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
        """Write down what was read, and tell the remote what it is to be told: (done, of how many).

        Raises RemoteError where it cannot be told; it will be later.
        """
        self._read_through.flush()
        self.write_back.flush(progress)

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        return self.disk.verify(repair=repair)

    def refusal(self) -> str | None:
        return self.disk.refusal()

    def close(self) -> None:
        with ExitStack() as every:  # each is closed whatever becomes of the others
            every.callback(self._blocks.clear)
            every.callback(self.disk.close)
            every.callback(self.write_back.close, self._patience_s)
            every.callback(self._read_through.close)

    def _get_header(self, key: ChunkKey) -> StoredChunk | Miss:
        """What is found on disk, or else in the remote. Why there is nothing is looked up on disk
        alone."""
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
        """The Miss of a chunk that is neither here nor there."""
        return there if here.reason == "absent" else here

    def _heal(self, key: ChunkKey, here: Miss) -> None:
        """The remote has a chunk that cannot be found here: take out the record here if it is
        damaged."""
        if here.reason in ("corrupt", "truncated", "foreign"):
            logger.warning("chunk %s is read anew: %s here", key.digest.hex()[:12], here.reason)
            with suppress(LockedError):  # whoever writes will come upon it too
                self.disk.drop_local(key.digest)
                self._counts.add("healed")

    def _put_there(self, key: ChunkKey, kv: ChunkKV) -> None:
        """Put a chunk for which there is no room here."""
        if self._is_gone(key.content, key.digest):  # the remote must be told that before
            self.write_back.flush()
        for each in (key, *(with_codec(key, name) for name in self.remote_codecs)):
            self.objects.put(encode_chunk(each, kv), replacing=True)
        self.disk.drop_local(key.digest)

    def _is_gone(self, content: bytes, digest: bytes) -> bool:
        """Whether a chunk has been deleted, though the remote may not know it yet."""
        with self.disk.tables.read() as txn:
            return outbox.is_deleted(txn, content, digest)

    def _range(self, key: ChunkKey, layer: int) -> tuple[Header, Bytes] | Miss:
        """A layer of the remote, as it is stored there."""
        if self._is_gone(key.content, key.digest):
            return Miss("absent", "it was deleted")
        return self._read_through.layer(key, layer)

    def _settled(self, key: ChunkKey, layer: int, found: tuple[Header, Bytes] | Miss) -> KVPair:
        """A layer that was ``found`` in the remote; where it was not, it may have come to the disk
        meanwhile."""
        if isinstance(found, Miss) and self.disk.has(key):
            return self.layer(key, layer)
        return self._decoded(key, layer, found)

    def _decoded(self, key: ChunkKey, layer: int, found: tuple[Header, Bytes] | Miss) -> KVPair:
        if not isinstance(found, Miss):
            header, raw = found
            own = self._blocks.empty(len(raw))  # what is decoded may be written to, and is checked
            own[:] = raw
            pair = decode_layer(header, layer, own)
            if not isinstance(pair, Miss):
                return pair
            found = pair
        raise unusable_error(key, layer, self._hits.count(found))


def open_remote(disk: DiskStore, url: str, levels: str = "", *, pin: bool = False) -> RemoteStore:
    """``disk``, over the remote of that URL (see :class:`Bucket`); ``levels`` with commas.

    Raises ConfigError where one of them cannot be.
    """
    names = [name.strip() for name in levels.split(",") if name.strip()]
    return RemoteStore(disk, ChunkObjects(Bucket(url)), remote_codecs=names, pin=pin)
