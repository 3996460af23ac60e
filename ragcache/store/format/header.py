"""The header of a chunk, version 1: what is stored under a key, and the checksums of its layers.

All integers are little-endian.

=================  ====================================================================
(preamble)         ``RAGCHUNK``, version u32, bytes of the whole header u32
(fixed)            key, fingerprint and content digests, 32 bytes each; version u64;
                   layers, kv_heads, head_dim, tokens, u32 each
(strings)          dtype, codec, mode, tenant, printable fingerprint, file: length u32, UTF-8
(tokens)           token ids, u32 each
(sensitivity)      how many follow, u32: none or as many as tokens; float32 each
(payload table)    per layer: offset u64, length u64, checksum u64
(trailer)          xxh3-64 of everything before, u64
=================  ====================================================================

``file`` names the file that holds the layers, each at its offset; where it is empty, the layers are
records of their own and offsets are 0. A layer's checksum is xxh3-64 of its bytes, seeded with its
key digest and layer number, so that a layer stored as another chunk's or layer's does not match.
All future versions keep the first 16 and the last 8 bytes in place, so that a reader can tell a
newer header (foreign) from a damaged one (corrupt).
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from ragcache.errors import ConfigError
from ragcache.store.base import Miss, StoredChunk
from ragcache.store.format.codecs import CODECS, find_codec, is_codec
from ragcache.store.format.codecs.base import DTYPES
from ragcache.types import KVPair, KVSpec, Tokens

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV

_MAGIC = b"RAGCHUNK"
_VERSION = 1

_PREAMBLE = struct.Struct("<8sII")
_FIXED = struct.Struct("<32s32s32sQIIII")
_LENGTH = struct.Struct("<I")
_PAYLOAD = struct.Struct("<QQQ")
_CHECKSUM = struct.Struct("<Q")


class Payload(NamedTuple):
    """Where the bytes of one layer are, and their checksum."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header record."""

    key: bytes
    fingerprint: bytes
    content: bytes
    version: int  # random; differs for every put
    name: str  # the fingerprint, printable
    tenant: str
    mode: str
    codec: str
    file: str  # empty: layers are records
    spec: KVSpec
    tokens: Tokens
    sensitivity: tuple[float, ...]
    payloads: tuple[Payload, ...]

    @classmethod
    def of(
        cls, key: ChunkKey, kv: ChunkKV, payloads: Sequence[Payload], *, file: str = ""
    ) -> Header:
        return cls(
            key=key.digest,
            fingerprint=key.fingerprint.digest,
            content=key.content,
            version=secrets.randbits(64),
            name=str(key.fingerprint),
            tenant=key.tenant,
            mode=key.mode,
            codec=key.codec,
            file=file,
            spec=kv.spec,
            tokens=key.tokens,
            sensitivity=kv.sensitivity,
            payloads=tuple(payloads),
        )

    @property
    def payload_bytes(self) -> int:
        return sum(payload.length for payload in self.payloads)

    def stored(self, key: ChunkKey) -> StoredChunk:
        """The StoredChunk of this header, found under ``key``."""
        return StoredChunk(
            key,
            self.spec,
            len(self.tokens),
            tuple(payload.length for payload in self.payloads),
            self.sensitivity,
            self.version,
            origin=self,
        )

    def foreign(self, key: ChunkKey) -> Miss | None:
        """A miss where this header, found under ``key``, names something else, or KV of another
        shape than the model's. Every record passes this check before it is read or stored."""
        for what, mine, wanted in (
            ("key", self.key, key.digest),
            ("fingerprint", self.fingerprint, key.fingerprint.digest),
            ("content", self.content, key.content),
            ("list of tokens", self.tokens, key.tokens),
            ("codec", self.codec, key.codec),
        ):
            if mine != wanted:
                return Miss("foreign", f"the record under this key names another {what}")
        if isinstance(why := find_codec(self.codec), str):  # its basis is missing
            return Miss("foreign", why)
        return shape_mismatch(self.spec, key.fingerprint.spec)


def shape_mismatch(found: KVSpec, wanted: KVSpec | None) -> Miss | None:
    """A miss where KV has another shape than ``wanted``; ``wanted`` is None where it is unknown."""
    if wanted is None or found == wanted:
        return None
    return Miss("foreign", f"its KV is {_shape(found)}, the model's is {_shape(wanted)}")


def _shape(spec: KVSpec) -> str:
    return f"{spec.layers} layers of {spec.kv_heads} heads of {spec.head_dim}, {spec.dtype}"


def encode_header(header: Header) -> bytes:
    """The header record of a chunk."""
    spec = header.spec
    fixed = _FIXED.pack(
        header.key,
        header.fingerprint,
        header.content,
        header.version,
        spec.layers,
        spec.kv_heads,
        spec.head_dim,
        len(header.tokens),
    )
    texts = (spec.dtype, header.codec, header.mode, header.tenant, header.name, header.file)
    strings = b"".join(_LENGTH.pack(len(raw)) + raw for raw in map(str.encode, texts))
    tokens = struct.pack(f"<{len(header.tokens)}I", *header.tokens)
    known = len(header.sensitivity)
    sensitivity = _LENGTH.pack(known) + struct.pack(f"<{known}f", *header.sensitivity)
    table = b"".join(_PAYLOAD.pack(*payload) for payload in header.payloads)
    body = fixed + strings + tokens + sensitivity + table
    size = _PREAMBLE.size + len(body) + _CHECKSUM.size
    record = _PREAMBLE.pack(_MAGIC, _VERSION, size) + body
    return record + _CHECKSUM.pack(xxh3_64_intdigest(record))


def header_size(data: bytes) -> int | None:
    """The size of the header at the beginning of ``data``, unchecked; None where there is none."""
    if len(data) < _PREAMBLE.size or data[: len(_MAGIC)] != _MAGIC:
        return None
    return int(_PREAMBLE.unpack_from(data)[2])


@lru_cache(maxsize=512)  # each layer of a chunk decodes the same header
def decode_header(data: bytes) -> Header | Miss:
    """The header in ``data``, or a miss that says why there is none. Safe on any bytes. The basis
    of its codec may be missing: see :meth:`Header.foreign`."""
    if not data or data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        return Miss("foreign" if data else "truncated", "no ragcache header record")
    if len(data) < _PREAMBLE.size + _CHECKSUM.size:
        return Miss("truncated", f"{len(data)} bytes are too few for a header")
    _, version, size = _PREAMBLE.unpack_from(data)
    if len(data) < size:
        return Miss("truncated", f"{len(data)} bytes of a header of {size}")
    body = data[: -_CHECKSUM.size]
    if len(data) != size or _CHECKSUM.pack(xxh3_64_intdigest(body)) != data[len(body) :]:
        return Miss("corrupt", "the header does not match its checksum")
    if version != _VERSION:
        return Miss("foreign", f"record format {version}; this ragcache reads format {_VERSION}")
    try:
        header = _parse(body[_PREAMBLE.size :])
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        return Miss("corrupt", f"the header contradicts itself: {error}")
    if not is_codec(header.codec):
        return Miss("foreign", f"codec {header.codec!r} is unknown to this version of ragcache")
    return header


def _parse(body: bytes) -> Header:
    key, fingerprint, content, version, layers, heads, dim, count = _FIXED.unpack_from(body)
    parts = _Parts(body, _FIXED.size)
    dtype, codec, mode, tenant, name, file = (parts.take(parts.length()).decode() for _ in range(6))
    tokens = struct.unpack(f"<{count}I", parts.take(4 * count))
    known = parts.length()
    sensitivity = struct.unpack(f"<{known}f", parts.take(4 * known))
    table = parts.take(_PAYLOAD.size * layers)
    payloads = tuple(map(Payload._make, _PAYLOAD.iter_unpack(table)))
    if parts.at != len(body):
        raise ValueError("bytes left over")
    if known not in (0, count) or not all(map(math.isfinite, sensitivity)):
        raise ValueError("a sensitivity that is none")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    spec = KVSpec(layers, heads, dim, dtype)
    if not layers or not spec.layer_bytes(count):
        raise ValueError("a dimension of 0")
    if (coded := CODECS.get(codec)) is not None:
        size, most = coded.layer_bytes(spec, count), coded.most_bytes(spec, count)
        if size is not None and any(payload.length != size for payload in payloads):
            raise ValueError("payload lengths differ from the shape")
        if any(payload.length > most for payload in payloads):
            raise ValueError("a payload longer than its shape can be")
    return Header(
        key=key,
        fingerprint=fingerprint,
        content=content,
        version=version,
        name=name,
        tenant=tenant,
        mode=mode,
        codec=codec,
        file=file,
        spec=spec,
        tokens=tokens,
        sensitivity=sensitivity,
        payloads=payloads,
    )


class _Parts:
    """Reads a body from the front. Checks sizes first, so that no false count allocates memory."""

    def __init__(self, body: bytes, at: int) -> None:
        self.body, self.at = body, at

    def take(self, length: int) -> bytes:
        if length > len(self.body) - self.at:
            raise ValueError("a part is longer than the record")
        self.at += length
        return self.body[self.at - length : self.at]

    def length(self) -> int:
        (value,) = _LENGTH.unpack(self.take(_LENGTH.size))
        return int(value)


def layer_checksum(digest: bytes, layer: int, raw: Bytes) -> int:
    """The checksum of a layer of the chunk under ``digest``."""
    seed = xxh3_64_intdigest(digest + _LENGTH.pack(layer))
    return xxh3_64_intdigest(raw.data, seed=seed)


def check_layer_bytes(header: Header, layer: int, raw: Bytes) -> Miss | None:
    """A miss where these are not the bytes of that layer."""
    _, length, checksum = header.payloads[layer]
    if len(raw) < length:
        return Miss("truncated", f"{len(raw)} bytes of {length} in layer {layer}")
    if len(raw) > length:
        return Miss("corrupt", f"{len(raw)} bytes in layer {layer}, which has {length}")
    if layer_checksum(header.key, layer, raw) != checksum:
        return Miss("corrupt", f"layer {layer} does not match its checksum")
    return None


def payload_of(header: Header, layer: int) -> int:
    """The layer whose bytes hold ``layer``: see :meth:`Codec.payload_of`."""
    coded = find_codec(header.codec)
    return layer if isinstance(coded, str) else coded.payload_of(layer)


def decode_layer(header: Header, layer: int, raw: Bytes) -> KVPair | Miss:
    """Check and decode one layer: keys and values, each (kv_heads, tokens, head_dim), or a miss.

    ``raw``: the bytes of its :func:`payload_of`. Takes ownership of them: nothing else may write to
    them, so that what was checked is what is returned.
    """
    miss = check_layer_bytes(header, payload_of(header, layer), raw)
    if miss is not None:
        return miss
    if isinstance(coded := find_codec(header.codec), str):
        return Miss("foreign", coded)
    try:
        return coded.decode(raw, header.spec, len(header.tokens), layer)
    except ConfigError:  # a package is missing: the layer may be valid
        raise
    except ValueError as error:
        return Miss("corrupt", f"layer {layer} cannot be decoded as {header.codec}: {error}")
