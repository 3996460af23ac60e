"""Small keys and KV for tests of stores, and functions that damage stored data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ragcache.store import DiskStore
from ragcache.store.format.header import Header, Payload, decode_header
from ragcache.store.key import ChunkKey
from ragcache.testing.samples import (
    DIM,
    HEADS,
    LAYERS,
    MODEL,
    OTHER,
    make_key,
    make_kv,
    same,
    unversioned,
)

__all__ = ["DIM", "HEADS", "LAYERS", "MODEL", "OTHER", "make_key", "make_kv", "same", "unversioned"]

ONE, TWO = make_key(1), make_key(2)
CHUNK_BYTES = make_kv(ONE).spec.chunk_bytes(5)


def rewrite(store: DiskStore, table: str, key: bytes, change: Callable[[bytes], bytes]) -> None:
    """Change a record without the store's knowledge."""
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
    """Change a layer without the store's knowledge, wherever it is; a shorter one ends its file."""
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
