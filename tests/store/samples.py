"""Small keys and KV that the store's tests are made of, and damage to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ragcache.store import DiskStore, Miss, StoredChunk
from ragcache.store.format.header import Header, Payload, decode_header
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV, Fingerprint, Tokens

MODEL = Fingerprint((("weights", "a8b6"), ("dtype", "float32")), "tiny")
OTHER = Fingerprint((("weights", "9f11"), ("dtype", "float32")), "tiny")

LAYERS, HEADS, DIM = 3, 2, 8


def make_key(first: int = 0, fingerprint: Fingerprint = MODEL, context: Tokens = ()) -> ChunkKey:
    """A key of 5 tokens, which begin with ``first``."""
    return ChunkKey(fingerprint, tuple(range(first, first + 5)), context)


def make_kv(key: ChunkKey, seed: int = 0, dtype: torch.dtype = torch.float32) -> ChunkKV:
    """Random KV of 3 layers for the tokens of ``key``; other seeds, other values."""
    generator = torch.Generator().manual_seed(seed * 100_003 + key.tokens[0])

    def layers() -> tuple[Tensor, ...]:
        shape = (HEADS, len(key.tokens), DIM)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(LAYERS))

    sensitivity = torch.rand(len(key.tokens), generator=generator).tolist()
    return ChunkKV(key.tokens, layers(), layers(), tuple(sensitivity))


def same(left: ChunkKV | Miss, right: ChunkKV | Miss) -> bool:
    """Equal bit for bit, dtype included; misses by reason and detail."""
    if isinstance(left, Miss) or isinstance(right, Miss):
        return left == right
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    known = left.tokens, left.sensitivity
    return known == (right.tokens, right.sensitivity) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


def unversioned(found: StoredChunk | Miss) -> StoredChunk | Miss:
    """What was found, as it compares with what another store found of its own put."""
    return found if isinstance(found, Miss) else replace(found, version=0)


ONE, TWO = make_key(1), make_key(2)
CHUNK_BYTES = make_kv(ONE).spec.chunk_bytes(5)


def rewrite(store: DiskStore, table: str, key: bytes, change: Callable[[bytes], bytes]) -> None:
    """Change a record behind the store's back."""
    with store.tables.write() as txn:
        record = txn.get(table, key)
        assert record is not None
        txn.put(table, key, change(record))


def layer_of(digest: bytes, layer: int) -> bytes:
    """The row of a layer that is a record."""
    return digest + layer.to_bytes(2, "big")


def file_of(store: DiskStore, key: ChunkKey) -> tuple[Path | None, tuple[Payload, ...]]:
    """The file of a chunk, if it has one, and where its layers are."""
    with store.tables.read() as txn:
        header = decode_header(txn.get("headers", key.digest) or b"")
    assert isinstance(header, Header)
    path = store.tables.path / "kv" / header.file[:2] / header.file
    return (path if header.file else None), header.payloads


def rewrite_layer(
    store: DiskStore, key: ChunkKey, layer: int, change: Callable[[bytes], bytes]
) -> None:
    """Change a layer behind the store's back, wherever it is; a shorter one ends its file."""
    path, payloads = file_of(store, key)
    if path is None:
        rewrite(store, "layers", layer_of(key.digest, layer), change)
        return
    offset, length, _ = payloads[layer]
    with path.open("r+b") as file:
        file.seek(offset)
        changed = change(file.read(length))
        file.seek(offset)
        file.write(changed)
        if len(changed) < length:
            file.truncate()


def read_layer(store: DiskStore, key: ChunkKey, layer: int) -> bytes:
    """The bytes of a layer, wherever they are."""
    seen: list[bytes] = []

    def look(raw: bytes) -> bytes:
        seen.append(raw)
        return raw

    rewrite_layer(store, key, layer, look)
    return seen[0]
