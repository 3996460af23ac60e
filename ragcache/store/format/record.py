"""A chunk as it is stored: its header, and the bytes that a codec has made of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ragcache.errors import StoreError
from ragcache.store.base import Miss
from ragcache.store.format.codecs import codec
from ragcache.store.format.codecs.base import DTYPES, is_finite
from ragcache.store.format.header import Header, decode_layer, of_another_shape

if TYPE_CHECKING:
    from ragcache.store.disk.outbox import Level
    from ragcache.store.format.codecs.base import Bytes
    from ragcache.store.key import ChunkKey
    from ragcache.types import ChunkKV, ChunkNotes


class Record(NamedTuple):
    """A chunk as it is stored; offsets in its header may be those of another place."""

    header: Header
    raws: tuple[Bytes, ...]  # per layer


def check_kv(key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None = None) -> None:
    """Raise ValueError for KV or notes that cannot belong to ``key``, or cannot be stored;
    StoreError for KV that is not finite: an answer from it would be empty."""
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
    if (miss := of_another_shape(kv.spec, key.fingerprint.spec)) is not None:
        raise ValueError(f"KV that cannot be of {key.fingerprint}: {miss.detail}")
    if not all(map(is_finite, (*kv.keys, *kv.values))):
        raise StoreError(
            f"the KV that {key.fingerprint} has computed of {len(kv.tokens)} tokens holds NaN or "
            f"infinities, and is not stored: its numbers are too large for {kv.spec.dtype}. Use "
            "--dtype float32 or bfloat16, or look for damage in the model's weights."
        )
    if notes is not None and key.context:
        raise ValueError("only KV under a variant_key has notes")
    if notes is not None and len(notes.per_token) != len(kv.tokens):
        raise ValueError(f"notes on {len(notes.per_token)} tokens of a chunk of {len(kv.tokens)}")
    if not all(map(math.isfinite, kv.sensitivity)):
        raise ValueError("a token's sensitivity is not finite")
    if len(kv.keys) > 0xFFFF:
        raise ValueError(f"{len(kv.keys)} layers: a chunk record has at most 65535")


def encoded(key: ChunkKey, kv: ChunkKV) -> Record:
    """A chunk as it is stored. Raises ValueError as ``ChunkStore.put`` does."""
    check_kv(key, kv)
    return Record(Header.of(key, kv, ()), tuple(encoded_layers(key.codec, kv)))


def encoded_layers(name: str, kv: ChunkKV) -> Iterator[Bytes]:
    """The bytes of every layer in the codec of that name, each encoded when it is asked for."""
    coded, pairs = codec(name), zip(kv.keys, kv.values, strict=True)
    return (coded.encode(k, v, layer, len(kv.keys)) for layer, (k, v) in enumerate(pairs))


def undecodable(record: Record) -> Miss | None:
    """Why a chunk whose bytes are whole cannot be used, if it cannot: every layer is decoded."""
    for layer, raw in enumerate(record.raws):
        if isinstance(pair := decode_layer(record.header, layer, raw.copy()), Miss):
            return pair
    return None


def transcoded(record: Record, level: Level) -> Record:
    """The same chunk in another codec. Raises StoreError where it cannot be decoded."""
    header, coded = record.header, codec(level.codec)
    raws = []
    for layer, raw in enumerate(record.raws):
        pair = decode_layer(header, layer, raw.copy())
        if isinstance(pair, Miss):
            raise StoreError(
                f"chunk {header.key.hex()[:12]} cannot be recoded: {pair.detail}. Run `ragcache "
                "verify --repair`."
            )
        raws.append(coded.encode(*pair, layer, header.spec.layers))
    named = replace(
        header,
        key=level.key,
        fingerprint=level.fingerprint,
        name=level.name,
        codec=level.codec,
        payloads=(),
    )
    return Record(named, tuple(raws))
