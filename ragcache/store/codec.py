"""The record format, version 1: how one chunk's KV becomes bytes and comes back.

A chunk is one header record and one record per layer. All integers are little-endian.

=================  ====================================================================
header             ``RAGCHUNK``, version u32, bytes of the whole header u32
(fixed)            key, fingerprint and content digests, 32 bytes each;
                   layers, kv_heads, head_dim, tokens, u32 each
(strings)          dtype, codec, mode, tenant, printable fingerprint: length u32, UTF-8
(tokens)           token ids, u32 each
(sensitivity)      how many follow, u32: none or as many as tokens; float32 each
(payload table)    per layer: length u64, checksum u64
(trailer)          xxh3-64 of everything before, u64
-----------------  --------------------------------------------------------------------
layer, ``raw``     keys, then values, each (kv_heads, tokens, head_dim) in C order
=================  ====================================================================

A layer's checksum is xxh3-64 seeded with its key digest and layer number, so that a layer record
under another chunk's or layer's name never passes. Every future version keeps the first 16 and
the last 8 bytes of a header where they are: a reader can then tell a newer record (foreign) from
a damaged one (corrupt).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ragcache.store.base import Miss, Stored
from ragcache.types import KVSpec, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV, ChunkNotes

Bytes = NDArray[np.uint8]  # one-dimensional

MAGIC = b"RAGCHUNK"
VERSION = 1
CODEC = "raw"

_PREAMBLE = struct.Struct("<8sII")
_FIXED = struct.Struct("<32s32s32sIIII")
_LENGTH = struct.Struct("<I")
_PAYLOAD = struct.Struct("<QQ")
_CHECKSUM = struct.Struct("<Q")

#: dtype name -> torch dtype, integer dtype of the same width, its stored (little-endian) form.
#: NumPy has no bfloat16: KV crosses into it as integers, bit for bit.
_DTYPES: dict[str, tuple[torch.dtype, torch.dtype, np.dtype[Any]]] = {
    "float32": (torch.float32, torch.int32, np.dtype("<i4")),
    "bfloat16": (torch.bfloat16, torch.int16, np.dtype("<i2")),
    "float16": (torch.float16, torch.int16, np.dtype("<i2")),
}


@dataclass(frozen=True, slots=True)
class Header:
    """What a header record says. ``payloads`` has (length in bytes, checksum) per layer."""

    key: bytes
    fingerprint: bytes
    content: bytes
    name: str  # the fingerprint, printable
    tenant: str
    mode: str
    spec: KVSpec
    tokens: Tokens
    payloads: tuple[tuple[int, int], ...]
    sensitivity: tuple[float, ...] = ()
    codec: str = CODEC

    @classmethod
    def of(cls, key: ChunkKey, kv: ChunkKV, payloads: Sequence[tuple[int, int]]) -> Header:
        return cls(
            key=key.digest,
            fingerprint=key.fingerprint.digest,
            content=key.content,
            name=str(key.fingerprint),
            tenant=key.tenant,
            mode=key.mode,
            spec=kv.spec,
            tokens=key.tokens,
            payloads=tuple(payloads),
            sensitivity=kv.sensitivity,
        )

    def stored(self, key: ChunkKey) -> Stored:
        """What a store has found under ``key``."""
        return Stored(key, self.spec, len(self.tokens), self.sensitivity)

    @property
    def payload_bytes(self) -> int:
        return sum(length for length, _ in self.payloads)

    def foreign(self, key: ChunkKey) -> Miss | None:
        """A miss where this header, found under ``key``, names something else."""
        for what, mine, wanted in (
            ("key", self.key, key.digest),
            ("fingerprint", self.fingerprint, key.fingerprint.digest),
            ("content", self.content, key.content),
            ("list of tokens", self.tokens, key.tokens),
        ):
            if mine != wanted:
                return Miss("foreign", f"the record under this key names another {what}")
        return None


def check_kv(key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None = None) -> None:
    """Raise ValueError where these cannot be what ``key`` names, or cannot be stored."""
    if kv.tokens != key.tokens:
        raise ValueError(
            f"KV of {len(kv.tokens)} tokens does not belong to a key of {len(key.tokens)} tokens: "
            "the ids differ"
        )
    if not kv.tokens:
        raise ValueError("a chunk without tokens has no KV to store")
    dtypes = {str(t.dtype).removeprefix("torch.") for t in (*kv.keys, *kv.values)}
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
        raise ValueError(
            f"KV of dtype {', '.join(sorted(dtypes))}: use one of {', '.join(_DTYPES)} throughout"
        )
    if notes is not None and key.behind:
        raise ValueError("only KV under a variant_key has notes")
    if notes is not None and len(notes.per_token) != len(kv.tokens):
        raise ValueError(f"notes on {len(notes.per_token)} tokens of a chunk of {len(kv.tokens)}")
    if not all(map(math.isfinite, kv.sensitivity)):
        raise ValueError("a token's sensitivity is not finite")
    if len(kv.keys) > 0xFFFF:
        raise ValueError(f"{len(kv.keys)} layers: a chunk record has at most 65535")


def encode_header(header: Header) -> bytes:
    """The header record of a chunk."""
    spec = header.spec
    fixed = _FIXED.pack(
        header.key,
        header.fingerprint,
        header.content,
        spec.layers,
        spec.kv_heads,
        spec.head_dim,
        len(header.tokens),
    )
    strings = b"".join(
        _LENGTH.pack(len(raw)) + raw
        for raw in map(
            str.encode, (spec.dtype, header.codec, header.mode, header.tenant, header.name)
        )
    )
    tokens = struct.pack(f"<{len(header.tokens)}I", *header.tokens)
    count = len(header.sensitivity)
    sensitivity = _LENGTH.pack(count) + struct.pack(f"<{count}f", *header.sensitivity)
    table = b"".join(_PAYLOAD.pack(*payload) for payload in header.payloads)
    body = fixed + strings + tokens + sensitivity + table
    size = _PREAMBLE.size + len(body) + _CHECKSUM.size
    record = _PREAMBLE.pack(MAGIC, VERSION, size) + body
    return record + _CHECKSUM.pack(xxh3_64_intdigest(record))


@lru_cache(maxsize=512)  # every layer of a chunk is read with its header: the same bytes again
def decode_header(data: bytes) -> Header | Miss:
    """The header in ``data``, or why there is none. Safe on any bytes."""
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        return Miss("foreign" if data else "truncated", "no ragcache header record")
    if len(data) < _PREAMBLE.size + _CHECKSUM.size:
        return Miss("truncated", f"{len(data)} bytes are too few for a header")
    _, version, size = _PREAMBLE.unpack_from(data)
    if len(data) < size:
        return Miss("truncated", f"{len(data)} bytes of a header of {size}")
    body = data[: -_CHECKSUM.size]
    if len(data) != size or _CHECKSUM.pack(xxh3_64_intdigest(body)) != data[len(body) :]:
        return Miss("corrupt", "the header does not match its checksum")
    if version != VERSION:
        return Miss("foreign", f"record format {version}; this ragcache reads format {VERSION}")
    try:
        header = _parse(body[_PREAMBLE.size :])
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        return Miss("corrupt", f"the header contradicts itself: {error}")
    if header.codec != CODEC:
        return Miss("foreign", f"codec {header.codec!r}; this ragcache reads {CODEC!r}")
    return header


def _parse(body: bytes) -> Header:
    key, fingerprint, content, layers, heads, dim, count = _FIXED.unpack_from(body)
    at = _FIXED.size
    strings = []
    for _ in range(5):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        strings.append(_slice(body, at, length).decode())
        at += length
    dtype, codec, mode, tenant, name = strings
    tokens = struct.unpack(f"<{count}I", _slice(body, at, 4 * count))
    at += 4 * count
    (known,) = _LENGTH.unpack_from(body, at)
    at += _LENGTH.size
    sensitivity = struct.unpack(f"<{known}f", _slice(body, at, 4 * known))
    at += 4 * known
    table = _slice(body, at, _PAYLOAD.size * layers)
    payloads = tuple((length, checksum) for length, checksum in _PAYLOAD.iter_unpack(table))
    if at + len(table) != len(body):
        raise ValueError("bytes left over")
    if known not in (0, count) or not all(map(math.isfinite, sensitivity)):
        raise ValueError("a sensitivity that is none")
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    spec = KVSpec(layers, heads, dim, dtype)
    if not layers or not spec.layer_bytes(count):
        raise ValueError("a dimension of 0")
    if codec == CODEC and any(length != spec.layer_bytes(count) for length, _ in payloads):
        raise ValueError("payload lengths differ from the shape")
    return Header(
        key=key,
        fingerprint=fingerprint,
        content=content,
        name=name,
        tenant=tenant,
        mode=mode,
        spec=spec,
        tokens=tokens,
        payloads=payloads,
        sensitivity=sensitivity,
        codec=codec,
    )


def _slice(body: bytes, at: int, length: int) -> bytes:
    """``length`` bytes from ``at``; checked first, so that no count makes us allocate."""
    if length > len(body) - at:
        raise ValueError("a part is longer than the record")
    return body[at : at + length]


def encode_layers(key: ChunkKey, kv: ChunkKV) -> Iterator[tuple[memoryview, int]]:
    """Per layer, in order: the payload record and its checksum. One layer in memory at a time."""
    for layer, pair in enumerate(zip(kv.keys, kv.values, strict=True)):
        raw = np.concatenate([_bytes(tensor) for tensor in pair])
        yield raw.data, _layer_checksum(key.digest, layer, raw)


def decode_layer(
    header: Header, layer: int, data: bytes | memoryview
) -> tuple[Tensor, Tensor] | Miss:
    """Keys and values of one layer from its payload record, or why they cannot be used.

    Each is (kv_heads, tokens, head_dim). They share one allocation of their own: ``data`` is
    copied first and checked after, so that what was checked is what is returned.
    """
    length, checksum = header.payloads[layer]
    if len(data) < length:
        return Miss("truncated", f"{len(data)} bytes of {length} in layer {layer}")
    if len(data) > length:
        return Miss("corrupt", f"{len(data)} bytes in layer {layer}, which has {length}")
    raw = np.frombuffer(data, np.uint8).copy()
    if _layer_checksum(header.key, layer, raw) != checksum:
        return Miss("corrupt", f"layer {layer} does not match its checksum")
    dtype, _, stored = _DTYPES[header.spec.dtype]
    native = raw.view(stored).astype(stored.newbyteorder("="), copy=False)
    shape = (2, header.spec.kv_heads, len(header.tokens), header.spec.head_dim)
    keys, values = torch.from_numpy(native).view(dtype).view(shape)
    return keys, values


def _bytes(tensor: Tensor) -> Bytes:
    _, integers, stored = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
    native = tensor.detach().cpu().contiguous().view(integers).numpy().reshape(-1)
    return native.astype(stored, copy=False).view(np.uint8)


def _layer_checksum(digest: bytes, layer: int, raw: Bytes) -> int:
    seed = xxh3_64_intdigest(digest + _LENGTH.pack(layer))
    return xxh3_64_intdigest(raw.data, seed=seed)
