"""Chunks in objects of a bucket: one object for each, of the same bytes as a chunk's file.

``chunks/<content digest>/<key digest>``: the header, then the layers, each at a multiple of 4 KiB.
Here the header in front is the truth. What a name begins with says which tokens it is of, so one
listing finds all KV of a text, of whatever model; and digests spread load over a bucket's parts.

An object is written whole and on a condition: that there is none, or that it is still the one that
was seen. It is read in ranges, on the condition that it is still the one whose header was read.
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

_FOLDER = "chunks"
_FIRST = 16 << 10  # bytes read of an object to see its header; the rest of a longer one after that
_KNOWN = 4096  # headers that are remembered
_LONGEST_HEADER = 16 << 20  # bytes: of a chunk of a million tokens, in as many layers as can be
_CHANGES = 5  # of an object under our hands, before it is given up


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """The header of an object, and which object that was."""

    header: Header
    tag: str

    def stored(self, key: ChunkKey) -> StoredChunk:
        return replace(self.header.stored(key), is_remote=True)


class ChunkObjects:
    """Chunks in a bucket. Thread-safe; any number of machines may write.

    What cannot be read is a Miss, *unreadable* where the remote does not answer. Only writing,
    deleting and listing raise RemoteError.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.meter = bucket, BandwidthMeter()
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, ObjectHeader] = OrderedDict()

    def get_header(self, key: ChunkKey) -> ObjectHeader | Miss:
        """The header under ``key``, remembered or read."""
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
        """The Miss of ``key`` where its tokens are there under another key; keys whose digests are
        ``hidden`` do not count."""
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
        """The header of an object, read now; None where there is no such object."""
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
        """The bytes of a layer, checked, read-only, and the header that they go with.

        Where the object was replaced since its header was read, the header is read again.
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
        return Miss("unreadable", "its object is replaced all the time")

    def record(
        self, name: str, foreign: Callable[[Header], Miss | None] = lambda _: None
    ) -> Record | Miss | None:
        """A whole object, every layer checked; None where it is not there. The Miss of an object
        whose header is ``foreign``, or names another, is told before any layer is read."""
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

        ``replacing``: what another has put under this key gives way. Without, only what is damaged
        does: whoever has written a key first has written the same KV.
        """
        header, data = encode_object(record)
        name, tag = object_name(header.content, header.key), None
        for _ in range(_CHANGES):
            if self.bucket.put(name, data, tag=tag):
                self.uncache(header.key)
                return True
            seen = self.fetch_header(name)
            if isinstance(seen, ObjectHeader) and (
                seen.header.version == header.version or not replacing  # an answer that was lost
            ):
                return False
            tag = self._tag(name, seen)
        raise RemoteError(
            f"{name} in {self.bucket.url} is replaced all the time: it was not written"
        )

    def delete(self, content: bytes, digest: bytes | None = None) -> int:
        """Remove one chunk, or all KV of these tokens; how many objects that was."""
        if digest is not None:
            names = [object_name(content, digest)]
        else:
            names = [name for name, _ in self.names(content)]
        self.bucket.delete(*names)
        for name in names:
            self.uncache(digest_of(name))
        return len(names)

    def names(self, content: bytes | None = None) -> Iterator[tuple[str, int]]:
        """Objects and their sizes, of all chunks or of those of these tokens, in no order; what
        somebody else has put among them is passed over."""
        folder = _FOLDER if content is None else f"{_FOLDER}/{content.hex()}"
        for name, size in self.bucket.list(folder):
            if _is_ours(name):
                yield name, size

    def uncache(self, digest: bytes) -> None:
        """Remember nothing of a chunk."""
        with self._lock:
            self._known.pop(digest, None)

    def _tag(self, name: str, seen: ObjectHeader | Miss | None) -> str | None:
        """Which object is to be replaced; None where there is none by now."""
        if isinstance(seen, ObjectHeader):
            return seen.tag
        try:
            return self.bucket.get(name, 0, 1, check=lambda got: got.tag)
        except InvalidObjectError:  # something that is no object: it has no tag, and gives way
            return ""


def object_name(content: bytes, digest: bytes) -> str:
    """Where a chunk is, by the digests of its tokens and its key."""
    return f"{_FOLDER}/{content.hex()}/{digest.hex()}"


def digest_of(name: str) -> bytes:
    """The key digest that an object's name ends in."""
    return bytes.fromhex(name.rpartition("/")[2])


def content_of(name: str) -> bytes:
    """The content digest that an object's name begins with, behind the folder."""
    return bytes.fromhex(name.split("/")[-2])


def encode_object(record: Record) -> tuple[Header, bytearray]:
    """The bytes of an object, and the header in front of them."""
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
    """A miss where the object of that name says that it is another, or other tokens than its
    name: what it may be long is then not known."""
    named = content_of(name), digest_of(name)
    if (header.content, header.key) != named:
        return Miss("foreign", "the object under this name names another chunk")
    if digest_content(header.tenant, header.tokens) != header.content:
        return Miss("foreign", "the object has other tokens than its name says")
    return None


def _misplaced(header: Header) -> Miss | None:
    """A miss where layers do not follow each other as :func:`encode_object` puts them: what lies
    between them would be read as well, however much it is."""
    at = page_aligned(len(encode_header(header)))
    for offset, length, _ in header.payloads:
        if offset != at:
            return Miss("foreign", f"a layer at byte {offset} of its object, and not at {at}")
        at = page_aligned(offset + length)
    return None


def _end(header: Header) -> int:
    return max(offset + length for offset, length, _ in header.payloads)


def _header(got: ObjectRange) -> ObjectHeader | int:
    """The header that an object begins with, or how long it is where that is not all of it."""
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
