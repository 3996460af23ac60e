"""Verifies a store on disk: reads every chunk, and finds layers without a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ragcache.store.base import Miss
from ragcache.store.disk import kv_shapes
from ragcache.store.disk.header_index import all_digests
from ragcache.store.format.header import decode_header
from ragcache.store.key import DIGEST

if TYPE_CHECKING:
    from ragcache.store.disk.layer_storage import ChunkLayers
    from ragcache.store.lmdb.tables import Tables, Transaction

_AFTER_LAYERS = b"\xff\xff\xff"  # sorts after every u16 layer of a digest


def find_damage(
    tables: Tables, layers: ChunkLayers, progress: Callable[[int, int], None] | None = None
) -> dict[bytes, Miss]:
    """Key digest -> what is wrong, for all chunks and for layers without a header.

    ``progress`` is called with (done, total) before each, and at the end.
    """
    bad = {}
    every = [*all_digests(tables), *_orphans(tables)]
    for number, digest in enumerate(every):
        if progress is not None:
            progress(number, len(every))
        with tables.read() as txn:
            miss = check_chunk(txn, layers, digest)
        if miss is not None:
            bad[digest] = miss
    if progress is not None:
        progress(len(every), len(every))
    return bad


def check_chunk(txn: Transaction, layers: ChunkLayers, digest: bytes) -> Miss | None:
    """What is wrong with the chunk under ``digest``; None if nothing, or if it is gone."""
    record = txn.get("headers", digest)
    rows = sum(1 for _ in txn.keys("layers", digest))
    if record is None:
        return Miss("truncated", f"{rows} layers without a header") if rows else None
    header = decode_header(record)
    if isinstance(header, Miss):
        return header
    if header.key != digest:
        return Miss("foreign", f"the header names {header.key.hex()[:12]}")
    if (miss := kv_shapes.check_shape(txn, header)) is not None:
        return miss
    chunk = layers.chunk(txn, header)
    if isinstance(chunk, Miss):
        return chunk
    expected = 0 if header.file else header.spec.layers
    if rows != expected:
        return Miss("corrupt", f"{rows} layers stored, {expected} expected")
    return None


def _orphans(tables: Tables) -> Iterator[bytes]:
    """Digests with layer records but without a header."""
    start = b""
    while True:
        with tables.read() as txn:
            key = next(txn.keys("layers", start=start), None)
            if key is None:
                return
            digest = key[:DIGEST]
            orphan = txn.view("headers", digest) is None
        if orphan:
            yield digest
        start = digest + _AFTER_LAYERS
