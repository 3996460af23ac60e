"""Records: chunks as stored, that is a header and the encoded bytes of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ragcache.errors import StoreError
from ragcache.store.base import Miss
from ragcache.store.format.codecs import codec
from ragcache.store.format.codecs.base import DTYPES, is_finite
from ragcache.store.format.header import Header, decode_layer, payload_of, shape_mismatch

if TYPE_CHECKING:
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV, ChunkNotes, KVPair

__all__ = ["TranscodeTarget", "as_stored"]


class Record(NamedTuple):
    """A chunk as stored. Offsets in its header may be those of another place."""

    header: Header
    raws: tuple[Bytes, ...]  # per layer


class TranscodeTarget(NamedTuple):
    """What the header of a chunk's copy in another codec names."""

    codec: str
    key: bytes
    fingerprint: bytes
    name: str  # the fingerprint, printable

    @classmethod
    def of(cls, key: ChunkKey) -> TranscodeTarget:
        return cls(key.codec, key.digest, key.fingerprint.digest, str(key.fingerprint))


def check_kv(key: ChunkKey, kv: ChunkKV) -> None:
    """Raise ValueError for KV that does not belong to ``key`` or cannot be stored; StoreError for
    KV that is not finite."""
    if kv.tokens != key.tokens:
        raise ValueError(
            f"KV of {len(kv.tokens)} tokens does not belong to a key of {len(key.tokens)} tokens: "
            "the ids differ"
        )
    if not kv.tokens:
        raise ValueError("a chunk without tokens has no KV to store")
    dtypes = {str(t.dtype).removeprefix("torch.") for t in (*kv.keys, *kv.values)}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ValueError(
            f"KV of dtype {', '.join(sorted(dtypes))}: use one of {', '.join(DTYPES)} throughout"
        )
    if (miss := shape_mismatch(kv.spec, key.fingerprint.spec)) is not None:
        raise ValueError(f"KV that cannot be of {key.fingerprint}: {miss.detail}")
    if not all(map(is_finite, (*kv.keys, *kv.values))):
        raise StoreError(
            f"the KV that {key.fingerprint} has computed of {len(kv.tokens)} tokens holds NaN or "
            f"infinities, and is not stored: its numbers are too large for {kv.spec.dtype}. Use "
            "--dtype float32 or bfloat16, or look for damage in the model's weights."
        )
    if not all(map(math.isfinite, kv.sensitivity)):
        raise ValueError("a token's sensitivity is not finite")
    if len(kv.keys) > 0xFFFF:
        raise ValueError(f"{len(kv.keys)} layers: a chunk record has at most 65535")


def check_notes(key: ChunkKey, kv: ChunkKV, notes: ChunkNotes) -> None:
    """Raise ValueError for notes that cannot be on the variant ``kv`` under ``key``."""
    if key.context:
        raise ValueError("only KV under a variant_key has notes")
    if len(notes.per_token) != len(kv.tokens):
        raise ValueError(f"notes on {len(notes.per_token)} tokens of a chunk of {len(kv.tokens)}")


def encode_chunk(key: ChunkKey, kv: ChunkKV) -> Record:
    """Encode a chunk. Raises ValueError as ``ChunkStore.put`` does."""
    check_kv(key, kv)
    return Record(Header.of(key, kv, ()), tuple(encode_layers(key.codec, kv)))


def encode_layers(name: str, kv: ChunkKV) -> Iterator[Bytes]:
    """The bytes of every layer in the codec ``name``, encoded one by one on iteration."""
    return codec(name).encode_layers(list(zip(kv.keys, kv.values, strict=True)))


def as_stored(key: ChunkKey, kv: ChunkKV) -> ChunkKV:
    """``kv`` as it is read after it was stored under ``key``: in the precision of its codec."""
    coded = codec(key.codec)
    if coded.lossless:
        return kv
    raws = list(encode_layers(key.codec, kv))
    pairs = list(coded.decode_layers(raws, kv.spec, len(kv.tokens)))
    return replace(kv, keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))


def check_decodable(record: Record) -> Miss | None:
    """Decode every layer of a record; a miss for the first that cannot be decoded."""
    return next((pair for pair in _decoded(record) if isinstance(pair, Miss)), None)


def _decoded(record: Record) -> Iterator[KVPair | Miss]:
    for layer in range(record.header.spec.layers):
        raw = record.raws[payload_of(record.header, layer)]
        yield decode_layer(record.header, layer, raw.copy())


def transcode(record: Record, target: TranscodeTarget) -> Record:
    """The same chunk in another codec. Raises StoreError where it cannot be decoded."""
    header, coded, pairs = record.header, codec(target.codec), []
    for pair in _decoded(record):
        if isinstance(pair, Miss):
            raise StoreError(
                f"chunk {header.key.hex()[:12]} cannot be recoded: {pair.detail}. Run `ragcache "
                "verify --repair`."
            )
        pairs.append(pair)
    named = replace(
        header,
        key=target.key,
        fingerprint=target.fingerprint,
        name=target.name,
        codec=target.codec,
        payloads=(),
    )
    return Record(named, tuple(coded.encode_layers(pairs)))
