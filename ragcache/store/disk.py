"""The store on local disk: headers in LMDB, layers in LMDB or in a file for each chunk.

LMDB reads small layers faster than plain files do, and large ones slower, cold ones above all
(docs/reliability.md has the figures). So each chunk has one of two layouts: *records*, one in LMDB
for every layer, or *file* (see files.py). The header says which, and is the truth: what no header
names is not there.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args

import numpy as np

from ragcache.blocks import SPARE_BYTES, Blocks
from ragcache.errors import ConfigError, StoreError
from ragcache.store import outbox, variants
from ragcache.store.base import (
    ChunkStore,
    Miss,
    Stored,
    StoreStats,
    Tally,
    Variant,
    check_layer,
    stale,
    unusable,
)
from ragcache.store.capacity import UNBOUNDED, Capacity, Quota
from ragcache.store.codecs import codec
from ragcache.store.directory import explained
from ragcache.store.environment import Environment
from ragcache.store.files import ChunkFiles, file_digest
from ragcache.store.header import (
    Header,
    Payload,
    Record,
    check_kv,
    check_layer_bytes,
    decode_header,
    decode_layer,
    encode_header,
    layer_checksum,
)
from ragcache.store.index import account, reindex, remove, totals
from ragcache.store.key import at_level
from ragcache.types import ChunkKV, ChunkNotes

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.store.codecs.base import Bytes
    from ragcache.store.key import ChunkKey
    from ragcache.store.tables import Transaction

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
Layout = Literal["auto", "records", "files"]
FILES_FROM = 256 << 10  # bytes of a layer from which ``auto`` gives a chunk a file
_AFTER_LAYERS = b"\xff\xff\xff"  # sorts after every u16 layer of a digest
_DIGEST = 32
WORTH_COMPACTING = 1 << 20  # unused bytes
_LOOK_EVERY = 16  # changes between two looks at what is unused
_PAGE = 1000  # digests listed per read transaction


class DiskStore(ChunkStore):
    """Chunks in the directory ``path``, made where it is missing (0700, files 0600).

    ``layout``: of chunks that are put from now on; ``auto`` gives those with layers of
    :data:`FILES_FROM` bytes and more a file. ``map_size``: bytes that LMDB's part can ever grow to;
    it reserves addresses, not space, so leave it huge. ``quota``: bytes of layers that it may hold;
    a ``put`` beyond that takes out what ``policy`` (see evict.py) gives up first, and raises
    StoreError where not enough may go. ``readonly``: for all processes but the one that writes.
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
        quota: Quota = UNBOUNDED,
        policy: str = "pgdsf",
        pin: bool = False,
    ) -> None:
        self.layout, self.quota = as_layout(layout), quota
        #: Where puts and deletions are told to a remote: the codecs in which chunks are sent there
        #: too, beside their own. See outbox.py.
        self.shared: tuple[str, ...] | None = None
        bounded = quota != UNBOUNDED and not readonly
        self._capacity = Capacity(quota, policy) if bounded else None
        self.tables = Environment(path, map_size=map_size, readonly=readonly)
        self._blocks = Blocks(SPARE_BYTES, pin=pin)
        self._files = ChunkFiles(self.tables.path / "kv")
        self._tally = Tally()
        self._changes = 0
        self._writing = threading.RLock()  # a change of chunks, from its first look on
        try:
            if not readonly:
                with explained(self.tables.path, "open"):
                    self._sweep()
            if self._capacity is not None:
                with self.tables.read() as txn:
                    self._capacity.load(txn)
        except BaseException:
            self.tables.close()
            raise

    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None = None) -> None:
        check_kv(key, kv, notes)
        coming = self._coming(key, kv)

        def also(txn: Transaction) -> None:
            if notes is not None:
                variants.put(txn, key.digest, notes)
            else:
                self._send(txn, key, coming.blank)

        self._place([coming], also)

    def put_all(self, chunks: Iterable[tuple[ChunkKey, ChunkKV]]) -> None:
        """All in one commit; one by one where there is a quota, for each may evict others."""
        if self._capacity is not None:
            super().put_all(chunks)
            return
        given = list(chunks)
        for key, kv in given:
            check_kv(key, kv, None)
        coming = [self._coming(key, kv) for key, kv in given]

        def also(txn: Transaction) -> None:
            for (key, _), one in zip(given, coming, strict=True):
                self._send(txn, key, one.blank)

        self._place(coming, also)

    def find(self, key: ChunkKey) -> Stored | Miss:
        found = self.peek(key)
        if self._capacity is not None and isinstance(found, Stored):
            self._capacity.hit(key.digest)
        return self._tally.count(found)

    def peek(self, key: ChunkKey) -> Stored | Miss:
        with self.tables.read() as txn:
            header = _find(txn, key)
        return header if isinstance(header, Miss) else header.stored(key)

    def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
        found = self._read(key, lambda txn, header: self._layer(txn, header, layer))
        if isinstance(found, Miss):
            raise unusable(key, layer, self._tally.count(found))
        return found

    def layers(self, chunks: Sequence[Stored], layer: int) -> list[tuple[Tensor, Tensor]]:
        # Headers as they were found: bytes that another put has replaced fail their checksum.
        headers = [h if isinstance(h := chunk.origin, Header) else None for chunk in chunks]
        sizes = [0 if h is None else _room(h.payloads[layer].length) for h in headers]
        block = self._blocks.empty(max(1, sum(sizes)))  # one for all, and one transaction
        found: list[tuple[Tensor, Tensor] | Miss | None] = []
        with self.tables.read() as txn:
            for header, end, size in zip(headers, accumulate(sizes), sizes, strict=True):
                room = block[end - size : end]
                found.append(None if header is None else self._layer(txn, header, layer, room))
        return [
            pair if isinstance(pair, tuple) else self.layer(chunk.key, layer)
            for chunk, pair in zip(chunks, found, strict=True)
        ]

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, every layer verified, all layers of one ``put``."""
        return self._tally.count(self._read(key, self._chunk))

    def variants(self, key: ChunkKey) -> list[Variant]:
        with self.tables.read() as txn:
            return variants.find(txn, key)

    def credit(self, worth: Mapping[ChunkKey, float]) -> None:
        with self.tables.write() as txn:
            for key, more in worth.items():
                variants.credit(txn, key, more)
        if self._capacity is not None:
            for key, more in worth.items():
                self._capacity.hit(key.digest, more)

    def hold(self, keys: Iterable[ChunkKey]) -> AbstractContextManager[None]:
        if self._capacity is None:
            return nullcontext()
        return self._capacity.hold(key.digest for key in keys)

    def delete(self, key: ChunkKey) -> bool:
        with self.change() as change:
            if self.shared is not None:
                outbox.delete(change.txn, key.content, key.digest)
            return change.forget(key.digest)

    @contextmanager
    def change(self) -> Iterator[DiskChange]:
        with self._writing:
            with self.tables.write() as txn:
                change = DiskChange(txn, shared=self.shared is not None)
                yield change
                if self._capacity is not None:
                    self._capacity.save(txn)
            if self._capacity is not None:
                for digest in change.forgotten:
                    self._capacity.discard(digest)
            for name in change.gone:  # nothing names them any more
                self._files.remove(name)
            self._changes += 1
            if self._changes % _LOOK_EVERY == 0:
                self._compact_if_wasteful()

    def _compact_if_wasteful(self) -> None:
        """What is committed is committed, whatever becomes of this."""
        try:
            if self.is_wasteful():
                self.compact()
        except (StoreError, OSError) as error:
            logger.warning("compaction of %s was given up: %s", self.tables.path, error)

    def is_wasteful(self) -> bool:
        """Whether LMDB's file is more than twice what is live in it, and worth a compaction."""
        size, live = self.tables.file.stat().st_size, self.tables.live_bytes()
        return size > 2 * live and size - live > WORTH_COMPACTING

    def compact(self) -> tuple[int, int]:
        """Give unused space in LMDB's file back: its bytes before and after. See Environment.

        Happens by itself, now and then, where the store :meth:`is_wasteful`. Files of chunks give
        their space back when they are removed.
        """
        with self._writing:
            return self.tables.compact()

    def convert(self, layout: Layout, *, progress: Callable[[int, int], None] | None = None) -> int:
        """Give every chunk that ``layout``; the number of those that had another.

        Each is moved whole, in one commit; killed at any point, a second call does the rest. A
        damaged chunk stays as it is. Chunks that are put from now on have this layout too.
        """
        self.layout, moved = layout, 0
        digests = list(self.keys())
        for number, digest in enumerate(digests):
            moved += self._move(digest)
            if progress is not None:
                progress(number + 1, len(digests))
        return moved

    def keys(self) -> Iterator[bytes]:
        start = b""
        while True:
            with self.tables.read() as txn:
                page = list(islice(txn.keys("headers", start=start), _PAGE))
            yield from page
            if len(page) < _PAGE:
                return
            start = page[-1] + b"\0"

    def headers(self, *, after: bytes = b"", most: int = _PAGE) -> list[Header]:
        """Of the chunks behind the digest ``after``, in the order of their digests. One that is
        damaged is left out."""
        start = after + b"\0" if after else b""
        with self.tables.read() as txn:
            digests = islice(txn.keys("headers", start=start), most)
            found = [decode_header(txn.get("headers", digest) or b"") for digest in digests]
        return [header for header in found if isinstance(header, Header)]

    def forget(self, digest: bytes) -> bool:
        """Remove a chunk by its digest; True if it was there."""
        with self.change() as change:
            header = decode_header(change.txn.get("headers", digest) or b"")
            if self.shared is not None and isinstance(header, Header):
                outbox.delete(change.txn, header.content, digest)
            return change.forget(digest)

    def drop(self, digest: bytes) -> None:
        """Remove a chunk here; a remote is told nothing."""
        with self.change() as change:
            change.forget(digest)

    def record(self, digest: bytes) -> Record | Miss:
        """A chunk as it is stored, every layer checked; counts nothing."""
        with self.tables.read() as txn:
            return self._record(txn, digest)

    def enter(self, record: Record) -> bool:
        """Keep a chunk of a remote, every layer of which was checked; True once it is durable.

        False, and nothing is changed, where there is one, or it was deleted and the remote has not
        been told yet. Raises FullError as ``put`` does.
        """
        header = record.header
        with self._writing:
            with self.tables.read() as txn:
                there = isinstance(decode_header(txn.get("headers", header.key) or b""), Header)
                if there or outbox.gone(txn, header.content, header.key):
                    return False
            self._place([_Coming.of(record, self._in_file(len(record.raws[0])))])
        return True

    def stats(self) -> StoreStats:
        with self.tables.read() as txn:
            chunks = txn.count("headers")
            sums = list(totals(txn))
        fingerprints: Counter[str] = Counter()
        for count, _, name in sums:
            fingerprints[name] += count
        payload_bytes = sum(payload for _, payload, _ in sums)
        evictions = self._capacity.evictions if self._capacity is not None else 0
        return StoreStats(
            chunks, payload_bytes, *self._tally.snapshot(), dict(fingerprints), evictions
        )

    @property
    def waiting(self) -> int:
        """Changes that a remote is still to be told."""
        with self.tables.read() as txn:
            return outbox.depth(txn)

    def verify(
        self, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, str]:
        """Read every record; hex digest -> what is wrong. ``repair`` drops the bad ones.

        Also finds layers that belong to no chunk. Does not count as hits or misses.
        """
        bad: dict[bytes, str] = {}
        digests = [*self.keys(), *self._orphans()]
        for number, digest in enumerate(digests):
            if progress is not None:
                progress(number, len(digests))
            with self.tables.read() as txn:
                miss = self._damage(txn, digest)
            if miss is not None:
                bad[digest] = f"{miss.reason}: {miss.detail}"
        if repair and bad:
            with self.change() as change:
                for digest in bad:
                    change.forget(digest)
                reindex(change.txn)
        return {digest.hex(): wrong for digest, wrong in bad.items()}

    def close(self) -> None:
        if self._capacity is not None:
            with suppress(StoreError), self.tables.write() as txn:
                self._capacity.save(txn)
        self.tables.close()

    def _read(
        self, key: ChunkKey, read: Callable[[Transaction, Header], Found | Miss]
    ) -> Found | Miss:
        """``read`` what is under ``key``; once more where it was replaced meanwhile.

        A file that another process has just replaced is gone, while records stay to the end of the
        transaction.
        """
        before: Header | None = None
        while True:
            with self.tables.read() as txn:
                header = _find(txn, key)
                if isinstance(header, Miss):
                    return header
                found = read(txn, header)
            if not isinstance(found, Miss) or not header.file or header == before:
                return found
            before = header

    def _in_file(self, layer_bytes: int) -> bool:
        return self.layout == "files" or (self.layout == "auto" and layer_bytes >= FILES_FROM)

    def _coming(self, key: ChunkKey, kv: ChunkKV) -> _Coming:
        coded = codec(key.codec)
        pairs = zip(kv.keys, kv.values, strict=True)
        raws = (coded.encode(k, v, layer, len(kv.keys)) for layer, (k, v) in enumerate(pairs))
        size = coded.layer_bytes(kv.spec, len(kv.tokens)) or kv.spec.layer_bytes(len(kv.tokens))
        blank = _blank(Header.of(key, kv, ()))
        return _Coming(blank, raws, self._in_file(size))

    def _send(self, txn: Transaction, key: ChunkKey, header: Header) -> None:
        """Note, where the store is shared, that a remote is to have this chunk."""
        if self.shared is not None:
            levels = [outbox.Level.of(at_level(key, name)) for name in self.shared]
            outbox.send(txn, key.content, key.digest, header.version, levels)

    def _place(
        self, coming: Sequence[_Coming], also: Callable[[Transaction], None] = lambda _: None
    ) -> None:
        """Write chunks, each in the place of what is there under its key; ``also`` in the same
        commit."""
        files: dict[bytes, Header] = {}
        try:
            for one in coming:
                if one.in_file:
                    files[one.blank.key] = self._write_file(one.blank, one.raws)
            with ExitStack() as committed, self.change() as change:
                for one in coming:
                    change.forget(one.blank.key)
                    header = files.get(one.blank.key) or change.put_layers(one.blank, one.raws)
                    if self._capacity is not None:
                        room = self._capacity.replaced(header, partial(_is_pinned, change.txn))
                        for victim in committed.enter_context(room):
                            change.evict(victim)
                    change.enter(header)
                also(change.txn)
        except BaseException:
            for header in files.values():
                if not self._is_named(header.file):
                    self._files.remove(header.file)
            raise

    def _write_file(self, blank: Header, raws: Iterable[Bytes]) -> Header:
        """The header of a file that now holds ``raws``, and that nothing names yet."""
        blank = replace(blank, file=self._files.new_name(blank.key))
        payloads = []
        path = self.tables.path
        with explained(path, "write to"), self._files.create(blank.file) as file:
            file.skip(len(encode_header(blank)))
            for layer, raw in enumerate(raws):
                checksum = layer_checksum(blank.key, layer, raw)
                payloads.append(Payload(file.append(raw), len(raw), checksum))
            header = replace(blank, payloads=tuple(payloads))
            file.finish(encode_header(header))
        return header

    def _is_named(self, file: str) -> bool:
        with self.tables.read() as txn:
            header = decode_header(txn.get("headers", file_digest(file)) or b"")
        return isinstance(header, Header) and header.file == file

    def _sweep(self) -> None:
        """Remove the files that a crash has left: those that no header names."""
        for name in self._files.names():
            if not self._is_named(name):
                self._files.remove(name)

    def _move(self, digest: bytes) -> bool:
        """Give a chunk the layout that it would get now; True if it had another and is whole."""
        with self._writing:
            with self.tables.read() as txn:
                header = decode_header(txn.get("headers", digest) or b"")
                if isinstance(header, Miss) or header.key != digest:
                    return False
                in_file = self._in_file(header.payloads[0].length)
                if in_file == bool(header.file) or self._damage(txn, digest) is not None:
                    return False
                record = self._record(txn, digest)
                noted = txn.get("variants", digest)

            def also(txn: Transaction) -> None:
                if noted is not None:
                    txn.put("variants", digest, noted)

            if isinstance(record, Miss):
                return False
            self._place([_Coming.of(record, in_file)], also)
        return True

    def _record(self, txn: Transaction, digest: bytes) -> Record | Miss:
        header = decode_header(txn.get("headers", digest) or b"")
        if isinstance(header, Miss):
            return header
        raws = []
        for layer in range(header.spec.layers):
            raw = self._raw(txn, header, layer)
            miss = raw if isinstance(raw, Miss) else check_layer_bytes(header, layer, raw)
            if isinstance(raw, Miss) or miss is not None:
                return cast("Miss", miss)
            raws.append(raw)
        return Record(header, tuple(raws))

    def _raw(
        self, txn: Transaction, header: Header, layer: int, room: Bytes | None = None
    ) -> Bytes | Miss:
        """The bytes of a layer, unchecked, in memory of their own: of ``room``, if they fit."""
        check_layer(layer, header.spec.layers)
        record = None if header.file else txn.view("layers", _layer_key(header.key, layer))
        if record is None and not header.file:
            return Miss("truncated", f"layer {layer} of {header.spec.layers} is missing")
        payload = header.payloads[layer]
        size = payload.length if record is None else len(record)
        if room is None or len(room) < size:
            room = self._blocks.empty(max(1, size))
        if record is None:
            return self._files.read(header.file, payload, room)
        raw = room[:size]
        raw[:] = np.frombuffer(record, np.uint8)
        return raw

    def _layer(
        self, txn: Transaction, header: Header, layer: int, room: Bytes | None = None
    ) -> tuple[Tensor, Tensor] | Miss:
        raw = self._raw(txn, header, layer, room)
        return raw if isinstance(raw, Miss) else decode_layer(header, layer, raw)

    def _chunk(self, txn: Transaction, header: Header) -> ChunkKV | Miss:
        pairs = []
        for layer in range(header.spec.layers):
            pair = self._layer(txn, header, layer)
            if isinstance(pair, Miss):
                return pair
            pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        return ChunkKV(header.tokens, keys, values, header.sensitivity)

    def _damage(self, txn: Transaction, digest: bytes) -> Miss | None:
        """What is wrong with what is stored under ``digest``; None too where it is gone by now."""
        record = txn.get("headers", digest)
        layers = sum(1 for _ in txn.keys("layers", digest))
        if record is None:
            return Miss("truncated", f"{layers} layers without a header") if layers else None
        header = decode_header(record)
        if isinstance(header, Miss):
            return header
        if header.key != digest:
            return Miss("foreign", f"the header names {header.key.hex()[:12]}")
        chunk = self._chunk(txn, header)
        if isinstance(chunk, Miss):
            return chunk
        expected = 0 if header.file else header.spec.layers
        if layers != expected:
            return Miss("corrupt", f"{layers} layers stored, {expected} expected")
        return None

    def _orphans(self) -> Iterator[bytes]:
        """What layer records are stored under, where there is no header for it."""
        start = b""
        while True:
            with self.tables.read() as txn:
                key = next(txn.keys("layers", start=start), None)
                if key is None:
                    return
                digest = key[:_DIGEST]
                orphan = txn.view("headers", digest) is None
            if orphan:
                yield digest
            start = digest + _AFTER_LAYERS


def as_layout(name: str) -> Layout:
    """``name`` if it is a layout; else ConfigError."""
    for layout in get_args(Layout):
        if name == layout:
            return cast("Layout", layout)
    raise ConfigError(f"layout is {name!r}: it must be one of {', '.join(get_args(Layout))}")


@dataclass(frozen=True, slots=True)
class _Coming:
    """A chunk to be written: its header but for the payloads and the file, and its layers."""

    blank: Header
    raws: Iterable[Bytes]
    in_file: bool

    @classmethod
    def of(cls, record: Record, in_file: bool) -> _Coming:
        return cls(_blank(record.header), record.raws, in_file)


def _blank(header: Header) -> Header:
    """Without what says where the layers are."""
    return replace(header, file="", payloads=(Payload(0, 0, 0),) * header.spec.layers)


class DiskChange:
    """A :class:`Change` of a store on disk."""

    def __init__(self, txn: Transaction, *, shared: bool = False) -> None:
        self.txn, self._shared = txn, shared
        self.gone: list[str] = []  # files that nothing names once this is committed
        self.forgotten: list[bytes] = []

    def forget(self, digest: bytes) -> bool:
        """Take a chunk out; True if it was there."""
        header = decode_header(self.txn.get("headers", digest) or b"")
        if isinstance(header, Header) and header.file:
            self.gone.append(header.file)
        self.forgotten.append(digest)
        return remove(self.txn, digest)

    def evict(self, digest: bytes) -> None:
        """Take a chunk out that has to make room: its policy knows."""
        self.forget(digest)
        self.forgotten.remove(digest)

    def forget_content(self, content: bytes) -> int:
        if self._shared:
            outbox.forget(self.txn, content)
        digests = [row[_DIGEST:] for row in self.txn.keys("contents", content)]
        return sum(map(self.forget, digests))

    def put_layers(self, blank: Header, raws: Iterable[Bytes]) -> Header:
        """Write layers as records; the header that goes with them."""
        payloads = []
        for layer, raw in enumerate(raws):
            self.txn.put("layers", _layer_key(blank.key, layer), raw.data)
            payloads.append(Payload(0, len(raw), layer_checksum(blank.key, layer, raw)))
        return replace(blank, payloads=tuple(payloads))

    def enter(self, header: Header) -> None:
        self.txn.put("headers", header.key, encode_header(header))
        account(self.txn, header, 1)


def _room(size: int) -> int:
    """So many bytes, and as many more that the next array is aligned as any of torch's."""
    return -(-size // 64) * 64


def _layer_key(digest: bytes, layer: int) -> bytes:
    return digest + layer.to_bytes(2, "big")


_decoded = lru_cache(256)(decode_header)  # one for each layer that is read of a chunk


def _find(txn: Transaction, key: ChunkKey) -> Header | Miss:
    record = txn.get("headers", key.digest)
    if record is None:
        return _absent(txn, key)
    header = _decoded(record)
    if isinstance(header, Miss):
        return header
    return header.foreign(key) or header


def _is_pinned(txn: Transaction, digest: bytes) -> bool:
    header = decode_header(txn.get("headers", digest) or b"")
    if isinstance(header, Miss):
        return False
    pinned = next(txn.keys("pins", header.content), None) is not None
    return pinned or outbox.waits(txn, header.content, digest)


def _absent(txn: Transaction, key: ChunkKey) -> Miss:
    for row in txn.keys("contents", key.content):
        other = decode_header(txn.get("headers", row[_DIGEST:]) or b"")
        if isinstance(other, Header):
            return stale(key, other.name, other.mode)
    return Miss("absent", "these tokens are not stored")
