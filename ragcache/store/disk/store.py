"""The store on local disk: headers in LMDB, layers in LMDB or in a file for each chunk.

Plain files are read faster than LMDB, cold ones above all (figures in docs/reliability.md), but
writing one costs a few syncs, which is too much for small layers. So each chunk has one of two
layouts: *records*, one in LMDB per layer, or *file* (see layer_storage.py). The header says which
and is authoritative: what no header names does not exist.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args

from ragcache.errors import ConfigError, StoreError
from ragcache.store.base import (
    ChunkStore,
    HitCounter,
    Miss,
    StoredChunk,
    StoreDescription,
    StoreStats,
    unusable_error,
)
from ragcache.store.disk import kv_shapes, outbox
from ragcache.store.disk.header_index import all_digests, find_header, read_totals, rebuild_index
from ragcache.store.disk.layer_storage import ChunkLayers, NewChunk
from ragcache.store.disk.quota import UNBOUNDED, Capacity, Quota
from ragcache.store.disk.variants import DiskVariants
from ragcache.store.disk.verify import find_damage
from ragcache.store.disk.writer import ChunkWriter, DiskChange, copied_notes
from ragcache.store.format.codecs import codec, find_codec
from ragcache.store.format.codecs.basis import register_bases
from ragcache.store.format.header import Header, decode_header
from ragcache.store.format.record import (
    Record,
    TranscodeTarget,
    check_kv,
    encode_layers,
    transcode,
)
from ragcache.store.key import IN_CONTEXT, with_codec
from ragcache.store.lmdb.directory import translate_errors
from ragcache.store.lmdb.environment import Environment
from ragcache.types import ChunkKV, KVPair

if TYPE_CHECKING:
    from ragcache.store.key import ChunkKey
    from ragcache.store.lmdb.tables import Transaction

__all__ = ["DiskStore", "parse_layout"]

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")
Layout = Literal["auto", "records", "files"]
FILES_FROM = 256 << 10  # bytes of a layer from which layout ``auto`` uses a file
WORTH_COMPACTING = 1 << 20  # unused bytes
_CHECK_EVERY = 16  # changes between two checks for unused space


class DiskStore(ChunkStore):
    """Chunks in the directory ``path``, made where it is missing (0700, files 0600).

    ``layout``: of chunks that are put from now on; ``auto`` uses a file for layers of
    :data:`FILES_FROM` bytes and more. ``map_size``: the most bytes that LMDB's file can grow to; it
    reserves addresses, not space, so leave it huge. ``quota``: bytes of layers that the store may
    hold; a ``put`` beyond that evicts by ``policy`` (see eviction.py), and raises FullError where
    not enough can be evicted. ``readonly``: for all processes but the writer. ``lazy``: the store
    must exist, and this process becomes its writer with the first change, which raises LockedError
    if another process is the writer.
    ``pin``: read into page-locked memory, from which a GPU copies faster and in the background.
    Raises StoreError where the directory cannot be opened. Not usable in a forked child: open it
    there anew, after spawn.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: Layout = "auto",
        map_size: int = 1 << 40,
        readonly: bool = False,
        lazy: bool = False,
        quota: Quota = UNBOUNDED,
        policy: str = "pgdsf",
        pin: bool = False,
    ) -> None:
        self.layout, self.quota = parse_layout(layout), quota
        #: Set where changes are written back to a remote: the codecs in which it gets copies of
        #: chunks besides their own. See outbox.py.
        self.outbox_codecs: tuple[str, ...] | None = None
        bounded = quota != UNBOUNDED and not readonly
        self._capacity = Capacity(quota, policy) if bounded else None
        register_bases(Path(path))
        self.tables = Environment(path, map_size=map_size, readonly=readonly, lazy=lazy)
        self._layers = ChunkLayers(self.tables, pin=pin)
        self._hits = HitCounter()
        self._writer = ChunkWriter(self.tables, self._layers, self._capacity)
        self._change_count = 0  # times
        self.variants = DiskVariants(self.tables, self._put_unsent, self._capacity)
        self.tables.on_become_writer = self._begin
        try:
            if self.tables.is_writer:
                self._begin()
        except BaseException:
            self.tables.close()
            raise

    def _begin(self) -> None:
        """Prepare for the first change, once this process is the writer."""
        with translate_errors(self.tables.path, "open"):
            self._layers.sweep()
        if self._capacity is not None:
            with self.tables.read() as txn:
                self._capacity.load(txn)

    def refusal(self) -> str | None:
        return self.tables.refusal()

    def strays(self) -> list[str]:
        """Unknown files in the directory of the chunks' files, which are left alone."""
        return self._layers.strays()

    @property
    def description(self) -> StoreDescription:
        return StoreDescription(type(self).__name__, self.layout)

    def put(self, key: ChunkKey, kv: ChunkKV) -> None:
        check_kv(key, kv)
        coming = self._new_chunk(key, kv)
        self._write([coming], lambda txn: self._add_to_outbox(txn, key, coming.blank))

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        """In one commit; one by one where there is a quota, since each may evict others."""
        if self._capacity is not None:
            super().put_all(chunks)
            return
        given = list(chunks)
        for key, kv in given:
            check_kv(key, kv)
        coming = [self._new_chunk(key, kv) for key, kv in given]

        def also(txn: Transaction) -> None:
            for (key, _), one in zip(given, coming, strict=True):
                self._add_to_outbox(txn, key, one.blank)

        self._write(coming, also)

    def get_header(self, key: ChunkKey, *, count: bool = True) -> StoredChunk | Miss:
        with self.tables.read() as txn:
            header = find_header(txn, key)
        found = header if isinstance(header, Miss) else header.stored(key)
        if not count:
            return found
        if self._capacity is not None and isinstance(found, StoredChunk):
            self._capacity.hit(key.digest)
        return self._hits.count(found)

    def layer(self, key: ChunkKey, layer: int) -> KVPair:
        found = self._read(key, lambda txn, header: self._layers.pair(txn, header, layer))
        if isinstance(found, Miss):
            raise unusable_error(key, layer, self._hits.count(found))
        return found

    def layers(self, chunks: Sequence[StoredChunk], layer: int) -> list[KVPair]:
        headers = [h if isinstance(h := chunk.origin, Header) else None for chunk in chunks]
        return [
            pair if isinstance(pair, tuple) else self.layer(chunk.key, layer)
            for chunk, pair in zip(chunks, self._layers.pairs(headers, layer), strict=True)
        ]

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, every layer checked, all layers of one ``put``."""
        return self._hits.count(self._read(key, self._layers.chunk))

    @contextmanager
    def lease(self, keys: Iterable[ChunkKey]) -> Iterator[None]:
        digests = [key.digest for key in keys]
        kept = self._capacity.lease(digests) if self._capacity is not None else nullcontext()
        with kept, self._layers.keep_open(digests):
            yield

    def delete(self, key: ChunkKey) -> bool:
        with self.change() as change:
            if self.outbox_codecs is not None:
                outbox.delete(change.txn, key.content, key.digest)
            return change.delete(key.digest)

    @contextmanager
    def change(self) -> Iterator[DiskChange]:
        with self._writer.begin(shared=self.outbox_codecs is not None) as change:
            yield change
        self._compact_if_wasteful()

    def _write(
        self,
        coming: Sequence[NewChunk],
        also: Callable[[Transaction], None] = lambda _: None,
        *,
        instead_of: bytes | None = None,
    ) -> None:
        self._writer.write(coming, also, instead_of=instead_of)
        self._compact_if_wasteful()

    def _compact_if_wasteful(self) -> None:
        """Compact now and then, after a change. A failure is logged: the change is committed."""
        try:
            with self._writer.lock:
                self._change_count += 1
                if self._change_count % _CHECK_EVERY == 0 and self.is_wasteful():
                    self.compact()
        except (StoreError, OSError) as error:
            logger.warning("compaction of %s was given up: %s", self.tables.path, error)

    def is_wasteful(self) -> bool:
        """Whether LMDB's file is more than twice its live data, by 1 MiB or more."""
        size, live = self.tables.file.stat().st_size, self.tables.live_bytes()
        return size > 2 * live and size - live > WORTH_COMPACTING

    def compact(self) -> tuple[int, int]:
        """Return unused space of LMDB's file to the file system; its bytes before and after.

        Runs by itself, now and then, where the store :meth:`is_wasteful`. The files of chunks need
        no compaction.
        """
        with self._writer.lock:
            return self.tables.compact()

    def convert(self, layout: Layout, *, progress: Callable[[int, int], None] | None = None) -> int:
        """Convert every chunk to ``layout``; the number of chunks that had another.

        Each chunk is one commit: after a kill, a second call converts the rest. Damaged chunks are
        skipped. Chunks that are put from now on have this layout too.
        """
        self.layout, moved = layout, 0
        every = list(self.keys())
        for done, digest in enumerate(every, 1):
            if self._writer.rewrite(digest, self._in_file):
                moved += 1
                self._compact_if_wasteful()
            if progress is not None:
                progress(done, len(every))
        return moved

    def recode(self, digest: bytes, target: TranscodeTarget) -> tuple[int, int] | Miss | None:
        """Replace a chunk by the same in another codec, in one commit; its bytes before and after.

        Where the store has the other already, which may be more exact, that is kept: None. Notes on
        a variant and the layout stay. A remote gets the new chunk, and keeps the old one, which
        others may use. Raises StoreError where the chunk cannot be decoded.
        """
        with self._writer.lock:
            with self.tables.read() as txn:
                there = isinstance(decode_header(txn.get("headers", target.key) or b""), Header)
            if there and target.key != digest:
                self.drop_local(digest)
                return None
            record = self.record(digest)
            if isinstance(record, Miss):
                return record
            header, raws = transcode(record, target)
            bytes_after = sum(raw.size for raw in raws)
            with self.tables.read() as txn:
                keep_notes = copied_notes(txn, digest, target.key)

            def also(txn: Transaction) -> None:
                keep_notes(txn)
                if self.outbox_codecs is not None and not header.mode.startswith(IN_CONTEXT):
                    outbox.send(txn, header.content, header.key, header.version, ())

            in_file = bool(record.header.file)
            self._write([NewChunk.of(header, raws, in_file=in_file)], also, instead_of=digest)
        return record.header.payload_bytes, bytes_after

    def keys(self) -> Iterator[bytes]:
        return all_digests(self.tables)

    def headers(self, *, after: bytes = b"", most: int = 1000) -> list[Header]:
        """Headers of up to ``most`` chunks after the digest ``after``, in the order of their
        digests, without damaged ones."""
        start = after + b"\0" if after else b""
        with self.tables.read() as txn:
            page = islice(txn.keys("headers", start=start), most)
            found = [decode_header(txn.get("headers", digest) or b"") for digest in page]
        return [header for header in found if isinstance(header, Header)]

    def delete_digest(self, digest: bytes) -> bool:
        """Delete a chunk by its key digest; True if it was there."""
        with self.change() as change:
            header = decode_header(change.txn.get("headers", digest) or b"")
            if self.outbox_codecs is not None and isinstance(header, Header):
                outbox.delete(change.txn, header.content, digest)
            return change.delete(digest)

    def drop_local(self, digest: bytes) -> None:
        """Delete a chunk on this disk only, not in a remote."""
        with self.change() as change:
            change.delete(digest)

    def record(self, digest: bytes) -> Record | Miss:
        """A chunk as stored, every layer checked. Counts nothing."""
        with self.tables.read() as txn:
            return self._layers.record(txn, digest)

    def put_record(self, record: Record) -> bool:
        """Store a chunk that was read from a remote and checked; True once it is durable.

        False, with nothing changed, where it is stored already, or was deleted here while the
        remote still has it, or is not of the recorded shape of its model. Raises FullError as
        ``put`` does.
        """
        header = record.header
        with self._writer.lock:
            with self.tables.read() as txn:
                there = isinstance(decode_header(txn.get("headers", header.key) or b""), Header)
                if there or outbox.is_deleted(txn, header.content, header.key):
                    return False
                if kv_shapes.check_shape(txn, header) is not None:
                    return False
            in_file = self._in_file(len(record.raws[0]))
            self._write([NewChunk.of(header, record.raws, in_file=in_file)])
        return True

    def stats(self) -> StoreStats:
        with self.tables.read() as txn:
            chunks = txn.count("headers")
            sums = list(read_totals(txn))
        fingerprints, built_bytes = Counter[str](), Counter[str]()
        for count, payload, name in sums:
            fingerprints[name] += count
            built_bytes[name] += payload
        payload_bytes = sum(payload for _, payload, _ in sums)
        return StoreStats(
            chunks,
            payload_bytes,
            *self._hits.snapshot(),
            dict(fingerprints),
            self.evictions,
            dict(built_bytes),
        )

    @property
    def evictions(self) -> int:
        """The number of chunks that were evicted since the store was opened."""
        return 0 if self._capacity is None else self._capacity.evictions

    @property
    def pending_writes(self) -> int:
        """The number of changes still to be sent to a remote."""
        with self.tables.read() as txn:
            return outbox.depth(txn)

    def verify(
        self, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, str]:
        """Read every record; hex digest -> what is wrong with it. ``repair`` deletes these.

        Also finds layers that belong to no chunk. Counts no hits or misses. ``progress`` is called
        with (done, total). Raises StoreError, and deletes nothing, for a ``repair`` of chunks that
        cannot be read only because the basis of their codec is missing.
        """
        bad = find_damage(self.tables, self._layers, progress)
        if repair and (why := self._lacks_basis(bad)):
            raise StoreError(
                f"{why}. Nothing is repaired. `ragcache index` with the store's model restores the "
                "basis, if a cache or the remote has it"
            )
        if repair and bad:
            with self.change() as change:
                for digest in bad:
                    change.delete(digest)
                rebuild_index(change.txn)
        return {digest.hex(): f"{miss.reason}: {miss.detail}" for digest, miss in bad.items()}

    def _lacks_basis(self, digests: Iterable[bytes]) -> str:
        """Why one of these chunks cannot be read although it may be valid; empty if none is so."""
        with self.tables.read() as txn:
            headers = [decode_header(txn.get("headers", digest) or b"") for digest in digests]
        named = {one.codec for one in headers if isinstance(one, Header)}
        return next((why for name in named if isinstance(why := find_codec(name), str)), "")

    def close(self) -> None:
        try:
            if self._capacity is not None and self._capacity.has_unsaved_uses:
                with suppress(StoreError), self.tables.write() as txn:
                    self._capacity.save(txn)
        finally:
            self.tables.close()

    def _read(
        self, key: ChunkKey, read: Callable[[Transaction, Header], _Found | Miss]
    ) -> _Found | Miss:
        """Call ``read`` with the header under ``key``, and again if the chunk was replaced.

        Unlike records, a file that another process replaces is gone before the transaction ends.
        """
        before: Header | None = None
        while True:
            with self.tables.read() as txn:
                header = find_header(txn, key)
                if isinstance(header, Miss):
                    return header
                found = read(txn, header)
            if not isinstance(found, Miss) or not header.file or header == before:
                return found
            before = header

    def _in_file(self, layer_bytes: int) -> bool:
        return self.layout == "files" or (self.layout == "auto" and layer_bytes >= FILES_FROM)

    def _put_unsent(self, key: ChunkKey, kv: ChunkKV, also: Callable[[Transaction], None]) -> None:
        """Put a chunk that is not sent to a remote, with ``also`` in the same commit."""
        check_kv(key, kv)
        self._write([self._new_chunk(key, kv)], also)

    def _new_chunk(self, key: ChunkKey, kv: ChunkKV) -> NewChunk:
        size = codec(key.codec).layer_bytes(kv.spec, len(kv.tokens))
        in_file = self._in_file(size or kv.spec.layer_bytes(len(kv.tokens)))
        return NewChunk.of(Header.of(key, kv, ()), encode_layers(key.codec, kv), in_file=in_file)

    def _add_to_outbox(self, txn: Transaction, key: ChunkKey, header: Header) -> None:
        """Add the chunk to the outbox, where the store has one."""
        if self.outbox_codecs is not None:
            copies = [TranscodeTarget.of(with_codec(key, name)) for name in self.outbox_codecs]
            outbox.send(txn, key.content, key.digest, header.version, copies)


def parse_layout(name: str) -> Layout:
    """``name`` as a layout. Raises ConfigError for any other name."""
    for layout in get_args(Layout):
        if name == layout:
            return cast("Layout", layout)
    raise ConfigError(f"layout is {name!r}: it must be one of {', '.join(get_args(Layout))}")
