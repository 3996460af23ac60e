"""Writes and deletes chunks on disk, one commit at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ragcache.errors import StoreError
from ragcache.store.disk import outbox
from ragcache.store.disk.header_index import digests_of_content, remove_chunk, update_index
from ragcache.store.disk.layer_storage import ChunkLayers, NewChunk
from ragcache.store.disk.quota import Capacity
from ragcache.store.disk.verify import check_chunk
from ragcache.store.format.checksummed import get_checksummed, put_checksummed
from ragcache.store.format.header import Header, decode_header, encode_header
from ragcache.store.format.record import Record

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Tables, Transaction


class DiskChange:
    """A :class:`Change` of a store on disk. ``shared``: deletions are added to the outbox."""

    def __init__(self, txn: Transaction, *, shared: bool = False) -> None:
        self.txn, self._shared = txn, shared
        self.unreferenced: list[str] = []  # files to remove after the commit
        self.deleted: list[bytes] = []  # chunks that were deleted, not evicted

    def insert(self, header: Header) -> None:
        """Add a chunk whose layers are written; none is stored under its key."""
        self.txn.put("headers", header.key, encode_header(header))
        update_index(self.txn, header, 1)

    def delete(self, digest: bytes) -> bool:
        """Delete a chunk by its key digest; True if it was there."""
        self.deleted.append(digest)
        return self.evict(digest)

    def evict(self, digest: bytes) -> bool:
        """Delete a chunk that the policy has chosen; True if it was there."""
        header = decode_header(self.txn.get("headers", digest) or b"")
        if isinstance(header, Header) and header.file:
            self.unreferenced.append(header.file)
        return remove_chunk(self.txn, digest)

    def delete_content(self, content: bytes) -> int:
        if self._shared:
            outbox.delete_content(self.txn, content)
        return sum(map(self.delete, list(digests_of_content(self.txn, content))))

    def is_pinned(self, digest: bytes) -> bool:
        """Whether a chunk must not be evicted: a document pins it, or it is not sent yet."""
        header = decode_header(self.txn.get("headers", digest) or b"")
        if not isinstance(header, Header):
            return False
        pinned = next(self.txn.keys("pins", header.content), None) is not None
        return pinned or outbox.is_unsent(self.txn, header.content, digest)


class ChunkWriter:
    """Writes chunks to ``tables`` and their layers to ``layers``. Thread-safe.

    ``capacity`` chooses what to evict, where there is a quota.
    """

    def __init__(self, tables: Tables, layers: ChunkLayers, capacity: Capacity | None) -> None:
        self._tables, self._layers, self._capacity = tables, layers, capacity
        #: Held during a change, and by others to keep changes out.
        self.lock = threading.RLock()

    @contextmanager
    def begin(self, *, shared: bool = False) -> Iterator[DiskChange]:
        """See :meth:`ChunkStore.change`. ``shared`` as for DiskChange."""
        with self.lock:
            with self._tables.write() as txn:
                change = DiskChange(txn, shared=shared)
                yield change
                if self._capacity is not None:
                    self._capacity.save(txn)
            if self._capacity is not None:
                for digest in change.deleted:
                    self._capacity.discard(digest)
            for name in change.unreferenced:
                self._layers.remove(name)

    def write(
        self,
        coming: Sequence[NewChunk],
        also: Callable[[Transaction], None] = lambda _: None,
        *,
        instead_of: bytes | None = None,
    ) -> None:
        """Write chunks, each replacing the one under its key, delete the chunk ``instead_of``, and
        call ``also``, all in one commit. Raises FullError where not enough can be evicted."""
        self._tables.become_writer()  # before any file is written
        written = self._layers.written(coming)
        with written as files, ExitStack() as committed, self.begin() as change:
            if instead_of is not None:
                change.delete(instead_of)
            for one in coming:
                change.delete(one.blank.key)
                header = files.get(one.blank.key) or self._layers.put(change.txn, one)
                if self._capacity is not None:
                    room = self._capacity.making_room(header, change.is_pinned, instead_of)
                    for victim in committed.enter_context(room):
                        change.evict(victim)
                change.insert(header)
            also(change.txn)

    def rewrite(self, digest: bytes, to_file: Callable[[int], bool]) -> bool:
        """Write a chunk again in the layout that ``to_file`` chooses by the bytes of a layer; True
        if it had the other layout and is valid."""
        with self.lock:
            with self._tables.read() as txn:
                header = decode_header(txn.get("headers", digest) or b"")
                if not isinstance(header, Header) or header.key != digest:
                    return False
                in_file = to_file(header.payloads[0].length)
                if (
                    in_file == bool(header.file)
                    or check_chunk(txn, self._layers, digest) is not None
                ):
                    return False
                record = self._layers.record(txn, digest)
                keep_notes = copied_notes(txn, digest, digest)
            if not isinstance(record, Record):
                return False
            self.write([NewChunk.of(header, record.raws, in_file=in_file)], keep_notes)
        return True


def copied_notes(txn: Transaction, digest: bytes, to: bytes) -> Callable[[Transaction], None]:
    """Writes the notes on the variant ``digest``, if it is one and they are valid, for ``to``."""
    try:
        noted = get_checksummed(txn, "variants", digest)
    except (KeyError, StoreError):
        return lambda _: None
    return lambda later: put_checksummed(later, "variants", to, noted)
