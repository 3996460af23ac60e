"""Read-through caching: chunks that are read from a remote are stored on disk."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from ragcache.errors import FullError, LockedError, StoreError
from ragcache.store.base import Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.header import Header
from ragcache.store.format.record import Record, check_decodable
from ragcache.store.remote.bandwidth import MAX_REQUESTS
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.counts import EventCounts

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey

logger = logging.getLogger(__name__)

_RECENT_BYTES = 64 << 20  # that hold several layers, as they are stored
_MOST_BYTES = 1 << 30  # of chunks that are read and not yet written to disk


@dataclass(slots=True)
class _Arriving:
    """The layers of an object that were read so far."""

    header: Header
    raws: dict[int, Bytes]


class ReadThrough:
    """Reads from ``objects``, and stores on ``disk`` the chunks that were read under a lease.

    While a chunk is leased, its layers are collected as they are read. When its last lease ends, a
    background thread reads its other layers and writes it to disk.
    """

    def __init__(self, disk: DiskStore, objects: ChunkObjects) -> None:
        self._disk, self._objects = disk, objects
        self._most = inf if disk.quota.total is None else disk.quota.total
        self._lock = threading.Lock()
        self._counts = EventCounts()
        self._holders: Counter[bytes] = Counter()
        self._arriving: dict[bytes, _Arriving] = {}
        self._recent: OrderedDict[tuple[bytes, int], tuple[Header, Bytes]] = OrderedDict()
        self._reading: dict[tuple[bytes, int], Future[tuple[Header, Bytes] | Miss]] = {}
        self._bytes = 0  # of all chunks that are being collected, whole
        self.pool = ThreadPoolExecutor(MAX_REQUESTS, "ragcache-remote")
        self._writer = ThreadPoolExecutor(1, "ragcache-keep")

    @property
    def counts(self) -> Counter[str]:
        """``read_bytes``, chunks ``kept`` on disk, and chunks ``not_kept`` since there is no space,
        another process is the writer, or they cannot be used."""
        return self._counts.snapshot()

    @contextmanager
    def lease(self, keys: Iterable[ChunkKey]) -> Iterator[None]:
        """Collect the layers of these chunks, and keep them from being evicted, until the context
        ends."""
        held = list(keys)
        with self._lock:
            self._holders.update(key.digest for key in held)
        try:
            with self._disk.lease(held):
                yield
        finally:
            with self._lock:
                self._holders.subtract(key.digest for key in held)
                self._holders += Counter()
                free = {k for k in held if k.digest not in self._holders}
                come = [(k, self._arriving.pop(k.digest, None)) for k in free]
            for key, chunk in come:
                if chunk is not None:
                    with suppress(RuntimeError):  # closed meanwhile
                        self._writer.submit(self._keep, key, chunk)

    def layer(
        self, key: ChunkKey, layer: int, *, again: bool = False
    ) -> tuple[Header, Bytes] | Miss:
        """The bytes of a layer, checked and read-only, and the header of their object. ``again``:
        they will be asked for again soon, for other layers that they hold, and are remembered."""
        which = key.digest, layer
        with self._lock:
            if again and which in self._recent:
                self._recent.move_to_end(which)
                return self._recent[which]
            coming = self._reading.get(which)
            mine: Future[tuple[Header, Bytes] | Miss] = Future()
            if coming is None:
                self._reading[which] = mine
        if coming is not None:
            return coming.result()
        try:
            found = self._objects.layer(key, layer)
            if not isinstance(found, Miss):
                header, raw = found
                self._counts.add("read_bytes", len(raw))
                self._gather(key, layer, header, raw)
                if again:
                    self._remember(which, header, raw)
            mine.set_result(found)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._reading[which]
        return found

    def layers(self, key: ChunkKey, layers: Sequence[int]) -> Record | Miss:
        """Several layers, at least one, all of the same object; not collected."""
        while True:
            parts = list(self.pool.map(partial(self._objects.layer, key), layers))
            there = [part for part in parts if not isinstance(part, Miss)]
            self._counts.add("read_bytes", sum(len(raw) for _, raw in there))
            for part in parts:
                if isinstance(part, Miss):
                    return part
            header, _ = there[0]
            if all(other == header for other, _ in there):  # not replaced meanwhile
                return Record(header, tuple(raw for _, raw in there))

    def cache(self, record: Record) -> None:
        """Store a chunk on disk, if it can be used and there is space."""
        if (miss := check_decodable(record)) is not None:
            logger.warning("chunk %s is not kept: %s", record.header.key.hex()[:12], miss.detail)
            self._counts.add("not_kept")
            return
        try:
            if self._disk.put_record(record):
                self._counts.add("kept")
        except (FullError, LockedError):
            self._counts.add("not_kept")

    def flush(self) -> None:
        """Wait until the chunks whose leases have ended are on disk."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Finish the write that is running, and cancel the others. Closing twice is allowed."""
        self._writer.shutdown(cancel_futures=True)
        self.pool.shutdown(cancel_futures=True)

    def _remember(self, which: tuple[bytes, int], header: Header, raw: Bytes) -> None:
        with self._lock:
            self._recent[which] = header, raw
            size = sum(len(raw) for _, raw in self._recent.values())
            while size > _RECENT_BYTES:
                _, (_, oldest) = self._recent.popitem(last=False)
                size -= len(oldest)

    def _gather(self, key: ChunkKey, layer: int, header: Header, raw: Bytes) -> None:
        size = header.payload_bytes
        with self._lock:
            if key.digest not in self._holders or size > self._most:
                return
            chunk = self._arriving.get(key.digest)
            if chunk is None or chunk.header != header:  # replaced
                self._bytes -= 0 if chunk is None else chunk.header.payload_bytes
                self._arriving.pop(key.digest, None)
                if self._bytes + size > _MOST_BYTES:
                    return
                chunk = self._arriving[key.digest] = _Arriving(header, {})
                self._bytes += size
            chunk.raws[layer] = raw

    def _keep(self, key: ChunkKey, chunk: _Arriving) -> None:
        try:
            left = [n for n in range(chunk.header.spec.layers) if n not in chunk.raws]
            more = self.layers(key, left) if left else Record(chunk.header, ())
            if isinstance(more, Record) and more.header == chunk.header:
                raws = {**chunk.raws, **dict(zip(left, more.raws, strict=True))}
                self.cache(Record(chunk.header, tuple(raws[n] for n in sorted(raws))))
        except StoreError as error:
            self._counts.add("not_kept")
            logger.warning("chunk %s is not kept on disk: %s", key.digest.hex()[:12], error)
        except Exception:  # no caller to raise to
            self._counts.add("not_kept")
            logger.exception("chunk %s is not kept on disk", key.digest.hex()[:12])
        finally:
            with self._lock:
                self._bytes -= chunk.header.payload_bytes
