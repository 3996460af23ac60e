"""Chunks as objects of a bucket: one object per chunk, with the bytes of a chunk's file.

``chunks/<content digest>/<key digest>``: the header, then the layers, each at a multiple of 4 KiB.
Here the header in the object is authoritative. All KV of a text, of any model, has a common prefix,
so that one listing finds it; and digests spread the load over a bucket's partitions.

An object is written whole and conditionally: if there is none, or if it is still the one that was
read. It is read in ranges, if it is still the one whose header was read.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ragcache.errors import RemoteError
from ragcache.store.base import ABSENT, Miss, StoredChunk, check_layer, stale_miss
from ragcache.store.disk.chunk_files import page_aligned
from ragcache.store.format.header import (
    Header,
    Payload,
    check_layer_bytes,
    decode_header,
    encode_header,
    header_size,
    layer_checksum,
)
from ragcache.store.format.record import Record
from ragcache.store.key import digest_content
from ragcache.store.remote.bandwidth import BandwidthMeter
from ragcache.store.remote.object_store import Bucket, InvalidObjectError, ObjectRange

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey

__all__ = ["ChunkObjects"]

_FOLDER = "chunks"
_FIRST = 16 << 10  # bytes of the first read of a header; a longer one takes a second read
_KNOWN = 4096  # cached headers
_LONGEST_HEADER = 16 << 20  # bytes: of a million tokens and the most layers possible
_CHANGES = 5  # attempts while others replace the object


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """The header of an object, and the object's tag when it was read."""

    header: Header
    tag: str

    def stored(self, key: ChunkKey) -> StoredChunk:
        return replace(self.header.stored(key), is_remote=True)


class ChunkObjects:
    """Chunks in a bucket. Thread-safe; any number of machines may write.

    A failed read is a Miss, *unreadable* where the remote is down. Only writing, deleting and
    listing raise RemoteError.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.meter = bucket, BandwidthMeter()
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, ObjectHeader] = OrderedDict()

    def get_header(self, key: ChunkKey) -> ObjectHeader | Miss:
        """The header under ``key``, from the cache or read."""
        with self._lock:
            seen: ObjectHeader | Miss | None = self._known.get(key.digest)
        try:
            seen = seen or self.fetch_header(object_name(key.content, key.digest))
            if seen is None:
                return ABSENT
        except RemoteError as error:
            return Miss("unreadable", str(error))
        if isinstance(seen, ObjectHeader):
            seen = seen.header.foreign(key) or seen
        if isinstance(seen, ObjectHeader):
            with self._lock:
                self._known[key.digest] = seen
                self._known.move_to_end(key.digest)
                if len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
        return seen

    def others(self, key: ChunkKey, hidden: Callable[[bytes], bool]) -> Miss | None:
        """The *stale* Miss of ``key`` where its tokens are stored under another key whose digest is
        not ``hidden``; None where they are not."""
        try:
            for name, _ in sorted(self.names(key.content)):
                if digest_of(name) == key.digest or hidden(digest_of(name)):
                    continue
                if isinstance(other := self.fetch_header(name), ObjectHeader):
                    return stale_miss(key, other.header.name, other.header.mode)
        except RemoteError as error:
            return Miss("unreadable", str(error))
        return None

    def fetch_header(self, name: str) -> ObjectHeader | Miss | None:
        """Read the header of an object; None where there is no such object."""
        try:
            with self.meter.answered():
                found = self.bucket.get(name, 0, _FIRST, check=_header)
            if isinstance(found, int):
                found = self.bucket.get(name, 0, found, check=_header)
        except InvalidObjectError as again:
            return again.miss
        assert not isinstance(found, int)
        return found

    def layer(self, key: ChunkKey, layer: int) -> tuple[Header, Bytes] | Miss:
        """The bytes of a layer, checked and read-only, and the header of their object.

        Where the object was replaced since its header was read, reads the header again.
        """
        for _ in range(_CHANGES):
            if isinstance(seen := self.get_header(key), Miss):
                return seen
            check_layer(layer, seen.header.spec.layers)
            offset, length, _ = seen.header.payloads[layer]

            def whole(got: ObjectRange, seen: ObjectHeader = seen) -> Bytes:
                raw = np.frombuffer(got.data, np.uint8)
                if (miss := check_layer_bytes(seen.header, layer, raw)) is not None:
                    raise InvalidObjectError(miss)
                return raw

            name, end = object_name(key.content, key.digest), offset + length
            try:
                with self.meter.reading(length):
                    raw = self.bucket.get(name, offset, end, tag=seen.tag or None, check=whole)
            except InvalidObjectError as again:
                return again.miss
            except RemoteError as error:
                return Miss("unreadable", str(error))
            if raw is not None:
                return seen.header, raw
            self.uncache(key.digest)
        return Miss("unreadable", "its object is replaced again and again")

    def record(
        self, name: str, foreign: Callable[[Header], Miss | None] = lambda _: None
    ) -> Record | Miss | None:
        """A whole object, every layer checked; None where there is none. A header that names
        another chunk, or for which ``foreign`` returns a Miss, is rejected before layers are read.
        """
        seen = self.fetch_header(name)
        if not isinstance(seen, ObjectHeader):
            return seen
        header = seen.header
        if (miss := _elsewhere(header, name) or foreign(header)) is not None:
            return miss
        size = _end(header)

        def whole(got: ObjectRange) -> Record:
            data = np.frombuffer(got.data, np.uint8)
            raws = [data[at : at + length] for at, length, _ in header.payloads]
            for layer, raw in enumerate(raws):
                if (miss := check_layer_bytes(header, layer, raw)) is not None:
                    raise InvalidObjectError(miss)
            return Record(header, tuple(raws))

        try:
            with self.meter.reading(size):
                return self.bucket.get(name, 0, size, tag=seen.tag or None, check=whole)
        except InvalidObjectError as again:
            return again.miss

    def put(self, record: Record, *, replacing: bool) -> bool:
        """Write a chunk; False where that was not needed.

        With ``replacing``, replaces an object under this key; without, only a damaged one, since
        all valid objects under one key have the same KV.
        """
        header, data = encode_object(record)
        name, tag = object_name(header.content, header.key), None
        for _ in range(_CHANGES):
            if self.bucket.put(name, data, tag=tag):
                self.uncache(header.key)
                return True
            seen = self.fetch_header(name)
            if isinstance(seen, ObjectHeader) and (
                seen.header.version == header.version
                or not replacing  # written, and the response was lost
            ):
                return False
            tag = self._tag(name, seen)
        raise RemoteError(
            f"{name} in {self.bucket.url} is replaced again and again: it was not written"
        )

    def delete(self, content: bytes, digest: bytes | None = None) -> int:
        """Delete one chunk, or all KV with this content; the number of objects."""
        if digest is not None:
            names = [object_name(content, digest)]
        else:
            names = [name for name, _ in self.names(content)]
        self.bucket.delete(*names)
        for name in names:
            self.uncache(digest_of(name))
        return len(names)

    def names(self, content: bytes | None = None) -> Iterator[tuple[str, int]]:
        """Names and sizes of the objects of all chunks, or of those with this content, in no
        particular order. Other objects are skipped."""
        folder = _FOLDER if content is None else f"{_FOLDER}/{content.hex()}"
        for name, size in self.bucket.list(folder):
            if _is_ours(name):
                yield name, size

    def uncache(self, digest: bytes) -> None:
        """Drop the cached header of a chunk."""
        with self._lock:
            self._known.pop(digest, None)

    def _tag(self, name: str, seen: ObjectHeader | Miss | None) -> str | None:
        """The tag of the object to replace; None where there is none by now."""
        if isinstance(seen, ObjectHeader):
            return seen.tag
        try:
            return self.bucket.get(name, 0, 1, check=lambda got: got.tag)
        except InvalidObjectError:  # not a regular file: it has no tag, and is replaced
            return ""


def object_name(content: bytes, digest: bytes) -> str:
    """The name of a chunk's object, by its content and key digests."""
    return f"{_FOLDER}/{content.hex()}/{digest.hex()}"


def digest_of(name: str) -> bytes:
    """The key digest in an object's name."""
    return bytes.fromhex(name.rpartition("/")[2])


def content_of(name: str) -> bytes:
    """The content digest in an object's name."""
    return bytes.fromhex(name.split("/")[-2])


def encode_object(record: Record) -> tuple[Header, bytearray]:
    """The header of a chunk's object, and all its bytes, which begin with it."""
    blank = replace(record.header, file=record.header.key.hex())
    payloads, at = [], page_aligned(len(encode_header(blank)))
    for layer, raw in enumerate(record.raws):
        payloads.append(Payload(at, len(raw), layer_checksum(blank.key, layer, raw)))
        at = page_aligned(at + len(raw))
    header = replace(blank, payloads=tuple(payloads))
    data = bytearray(_end(header))
    encoded = encode_header(header)
    data[: len(encoded)] = encoded
    for (offset, length, _), raw in zip(payloads, record.raws, strict=True):
        data[offset : offset + length] = raw.data
    return header, data


def _is_ours(name: str) -> bool:
    return re.fullmatch(f"{_FOLDER}/[0-9a-f]{{64}}/[0-9a-f]{{64}}", name) is not None


def _elsewhere(header: Header, name: str) -> Miss | None:
    """A miss where the header names another chunk, or other tokens, than the object's name."""
    named = content_of(name), digest_of(name)
    if (header.content, header.key) != named:
        return Miss("foreign", "the object under this name names another chunk")
    if digest_content(header.tenant, header.tokens) != header.content:
        return Miss("foreign", "the object has other tokens than its name says")
    return None


def _misplaced(header: Header) -> Miss | None:
    """A miss where the layers are not placed as :func:`encode_object` places them. Gaps of any size
    would be read too."""
    at = page_aligned(len(encode_header(header)))
    for offset, length, _ in header.payloads:
        if offset != at:
            return Miss("foreign", f"a layer at byte {offset} of its object, not at {at}")
        at = page_aligned(offset + length)
    return None


def _end(header: Header) -> int:
    return max(offset + length for offset, length, _ in header.payloads)


def _header(got: ObjectRange) -> ObjectHeader | int:
    """The header at the beginning of an object, or its size where these bytes are too few."""
    data = bytes(got.data)
    size = header_size(data)
    if size is not None and size > _LONGEST_HEADER:
        raise InvalidObjectError(
            Miss("foreign", f"a header of {size} bytes: the longest has {_LONGEST_HEADER}")
        )
    if size is not None and len(data) < size <= got.size:
        return size
    header = decode_header(data[:size])
    if isinstance(header, Header):
        header = _misplaced(header) or header
    if isinstance(header, Header) and got.size < _end(header):
        header = Miss("truncated", f"its object has {got.size} bytes of {_end(header)}")
    if isinstance(header, Miss):
        raise InvalidObjectError(header)
    return ObjectHeader(header, got.tag)
