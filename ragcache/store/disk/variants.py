"""Variants on disk: several KV of one chunk, each with notes on the prompt it was cut from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ragcache.errors import StoreError
from ragcache.store.base import Variant, VariantStore
from ragcache.store.disk.header_index import digests_of_content
from ragcache.store.format.checksummed import get_checksummed, json_bytes, put_checksummed
from ragcache.store.format.header import Header, decode_header
from ragcache.store.format.record import check_notes
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkNotes

if TYPE_CHECKING:
    from ragcache.store.disk.quota import Capacity
    from ragcache.store.lmdb.tables import Tables, Transaction
    from ragcache.types import ChunkKV

_TABLE = "variants"


class DiskVariants(VariantStore):
    """The variants in ``tables``.

    ``put_chunk`` puts a chunk and calls a function with its transaction, in one commit.
    ``capacity`` counts scores as uses.
    """

    def __init__(
        self,
        tables: Tables,
        put_chunk: Callable[[ChunkKey, ChunkKV, Callable[[Transaction], None]], None],
        capacity: Capacity | None,
    ) -> None:
        self._tables, self._put_chunk, self._capacity = tables, put_chunk, capacity

    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes) -> None:
        check_notes(key, kv, notes)
        self._put_chunk(key, kv, lambda txn: _write(txn, key.digest, notes, 0.0))

    def find(self, key: ChunkKey) -> list[Variant]:
        with self._tables.read() as txn:
            return _find(txn, key)

    def add_score(self, scores: Mapping[ChunkKey, float]) -> None:
        with self._tables.write() as txn:
            for key, score in scores.items():
                if (found := _read(txn, key.digest)) is not None:
                    notes, before = found
                    _write(txn, key.digest, notes, before + score)
        if self._capacity is not None:
            for key, score in scores.items():
                self._capacity.hit(key.digest, score)


def _find(txn: Transaction, key: ChunkKey) -> list[Variant]:
    found = []
    for digest in digests_of_content(txn, key.content):
        header = decode_header(txn.get("headers", digest) or b"")
        if not isinstance(header, Header) or (noted := _read(txn, digest)) is None:
            continue
        own = ChunkKey(key.fingerprint, key.tokens, (), header.mode, key.tenant)
        if header.foreign(own) is None and len(noted[0].per_token) == len(key.tokens):
            found.append(Variant(header.stored(own), *noted))
    return found


def _write(txn: Transaction, digest: bytes, notes: ChunkNotes, score: float) -> None:
    before = [digest.hex() for digest in notes.before]
    fields = [score, before, notes.inter, notes.per_token, notes.impact]
    put_checksummed(txn, _TABLE, digest, json_bytes(fields))


def _read(txn: Transaction, digest: bytes) -> tuple[ChunkNotes, float] | None:
    """Notes and score of a variant; None where there are none, or they are damaged."""
    try:
        score, before, *rest = json.loads(get_checksummed(txn, _TABLE, digest))
    except (KeyError, StoreError):
        return None
    inter, per_token, impact = rest
    names = tuple(map(bytes.fromhex, before))
    return ChunkNotes(names, tuple(inter), tuple(per_token), impact), score
