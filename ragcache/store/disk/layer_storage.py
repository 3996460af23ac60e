"""Layers of chunks on disk, in either layout: one LMDB record per layer, or one file per chunk.

The header of a chunk names the file, if there is one; else its layers are rows of the table
``layers``. This module writes, reads, checks and decodes layers in both layouts, and removes files
that no header names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from ragcache.store.base import ABSENT, READ_THREADS, Miss, check_layer
from ragcache.store.disk.chunk_files import ChunkFiles, file_digest
from ragcache.store.format.header import (
    Header,
    Payload,
    check_layer_bytes,
    decode_header,
    decode_layer,
    encode_header,
    layer_checksum,
    payload_of,
)
from ragcache.store.format.record import Record
from ragcache.store.lmdb.directory import translate_errors
from ragcache.store.lmdb.environment import Environment
from ragcache.types import ChunkKV, KVPair
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.lmdb.tables import Transaction


_READAHEAD_BYTES = 16 << 20  # requested from the disk before they are read


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to be written: its layers, and its header without payloads and file name."""

    blank: Header
    raws: Iterable[Bytes]  # per layer; iterated once
    in_file: bool

    @classmethod
    def of(cls, header: Header, raws: Iterable[Bytes], *, in_file: bool) -> NewChunk:
        """Payloads and file name of ``header`` are dropped."""
        nowhere = (Payload(0, 0, 0),) * header.spec.layers
        return cls(replace(header, file="", payloads=nowhere), raws, in_file)


class ChunkLayers:
    """Layers of the chunks in ``tables``, and the memory that they are read into. Thread-safe.

    ``pin``: page-locked memory. Reads see the state of the given transaction, except that a file
    may have been removed since: a Miss, *truncated*.
    """

    def __init__(self, tables: Environment, *, pin: bool = False) -> None:
        self._tables = tables
        self._files = ChunkFiles(tables.path / "kv")
        self._blocks = BufferPool(SPARE_BYTES, pin=pin)

    def put(self, txn: Transaction, coming: NewChunk) -> Header:
        """Write layers as records; return the complete header."""
        blank, payloads = coming.blank, []
        for layer, raw in enumerate(coming.raws):
            txn.put("layers", _layer_key(blank.key, layer), raw.data)
            payloads.append(Payload(0, len(raw), layer_checksum(blank.key, layer, raw)))
        return replace(blank, payloads=tuple(payloads))

    @contextmanager
    def written(self, coming: Iterable[NewChunk]) -> Iterator[dict[bytes, Header]]:
        """Write the files of the chunks that get one, durably; their headers by key digest.

        The caller commits the headers within the context. Where it raises, files that no header
        names are removed again.
        """
        headers: dict[bytes, Header] = {}
        try:
            for one in coming:
                if one.in_file:
                    headers[one.blank.key] = self._write(one)
            yield headers
        except BaseException:
            for header in headers.values():
                if not self._is_named(header.file):
                    self._files.remove(header.file)
            raise

    def keep_open(self, digests: Iterable[bytes]) -> AbstractContextManager[None]:
        """See :meth:`ChunkFiles.keep_open`."""
        return self._files.keep_open(digests)

    def remove(self, file: str) -> None:
        """Remove a file that no header names any more."""
        self._files.remove(file)

    def sweep(self) -> None:
        """Remove files that no header names, which a crash has left."""
        for name in self._files.names():
            if not self._is_named(name):
                self._files.remove(name)

    def strays(self) -> list[str]:
        """Files among those of chunks with other names. They are never touched."""
        return list(self._files.strays())

    def pair(
        self, txn: Transaction, header: Header, layer: int, room: Bytes | None = None
    ) -> KVPair | Miss:
        """Keys and values of a layer, each (kv_heads, tokens, head_dim), checked. They are read
        into ``room`` if it is large enough."""
        check_layer(layer, header.spec.layers)
        raw = self._read(txn, header, payload_of(header, layer), room)
        return raw if isinstance(raw, Miss) else decode_layer(header, layer, raw)

    def pairs(self, headers: Sequence[Header | None], layer: int) -> list[KVPair | Miss | None]:
        """:meth:`pair` of several chunks, in one transaction and one block of memory; None for
        None. A layer that was replaced since does not match its header: a Miss."""
        sizes = [0 if h is None else _rounded(_payload(h, layer).length) for h in headers]
        block = self._blocks.empty(max(1, sum(sizes)))
        found: list[KVPair | Miss | None] = []
        coming, expected, ends = _in_files(headers, layer), 0, accumulate(sizes)
        with self._tables.read() as txn:
            for header, end, size in zip(headers, ends, sizes, strict=True):
                while expected < end + _READAHEAD_BYTES and (one := next(coming, None)):
                    self._files.expect(*one)
                    expected += one[1].length
                room = block[end - size : end]
                found.append(None if header is None else self.pair(txn, header, layer, room))
        return found

    def chunk(self, txn: Transaction, header: Header) -> ChunkKV | Miss:
        """The whole chunk, every layer checked."""
        pairs = []
        with self.keep_open([header.key]):
            for layer in range(header.spec.layers):
                pair = self.pair(txn, header, layer)
                if isinstance(pair, Miss):
                    return pair
                pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        return ChunkKV(header.tokens, keys, values, header.sensitivity)

    def record(self, txn: Transaction, digest: bytes) -> Record | Miss:
        """A chunk as stored, every layer checked."""
        if (found := txn.get("headers", digest)) is None:
            return ABSENT
        header = decode_header(found)
        if isinstance(header, Miss):
            return header
        raws = []
        with self.keep_open([digest]):
            for layer in range(header.spec.layers):
                raw = self._read(txn, header, layer)
                if isinstance(raw, Miss):
                    return raw
                if (miss := check_layer_bytes(header, layer, raw)) is not None:
                    return miss
                raws.append(raw)
        return Record(header, tuple(raws))

    def _read(
        self, txn: Transaction, header: Header, layer: int, room: Bytes | None = None
    ) -> Bytes | Miss:
        """The bytes of a layer, unchecked, in memory that nothing else uses: ``room``, if it is
        large enough."""
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

    def _write(self, coming: NewChunk) -> Header:
        """Write the layers to a new file; return the header, which is not committed yet."""
        blank = replace(coming.blank, file=self._files.new_name(coming.blank.key))
        payloads = []
        path = self._tables.path
        with translate_errors(path, "write to"), self._files.create(blank.file) as file:
            file.skip(len(encode_header(blank)))
            for layer, raw in enumerate(coming.raws):
                checksum = layer_checksum(blank.key, layer, raw)
                payloads.append(Payload(file.append(raw), len(raw), checksum))
            header = replace(blank, payloads=tuple(payloads))
            file.finish(encode_header(header))
        return header

    def _is_named(self, file: str) -> bool:
        """Whether a header names the file, or may name it: one that cannot be read, such as that
        of a later version."""
        with self._tables.read() as txn:
            record = txn.get("headers", file_digest(file))
        header = None if record is None else decode_header(record)
        return header is not None and (isinstance(header, Miss) or header.file == file)


def _in_files(headers: Sequence[Header | None], layer: int) -> Iterator[tuple[str, Payload]]:
    """The payloads to read from files, in order: of this layer, then of this thread's next one."""
    for number in (layer, layer + READ_THREADS):
        for header in headers:
            if header is not None and header.file and number < len(header.payloads):
                yield header.file, _payload(header, number)


def _payload(header: Header, layer: int) -> Payload:
    """Where the bytes are that hold a layer."""
    return header.payloads[payload_of(header, layer)]


def _rounded(size: int) -> int:
    """``size`` rounded up to torch's alignment of 64 bytes."""
    return -(-size // 64) * 64


def _layer_key(digest: bytes, layer: int) -> bytes:
    return digest + layer.to_bytes(2, "big")
