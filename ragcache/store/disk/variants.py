"""Variants on disk: several KV of one chunk, each with notes on the prompt it was cut from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ragcache.errors import StoreError
from ragcache.store.base import Variant
from ragcache.store.disk.header_index import digests_of_content
from ragcache.store.format.checksummed import get_checksummed, json_bytes, put_checksummed
from ragcache.store.format.header import Header, decode_header
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkNotes

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_TABLE = "variants"


def put(txn: Transaction, key: bytes, notes: ChunkNotes, score: float = 0.0) -> None:
    """Make the chunk under this digest a variant, or replace what was noted of it."""
    before = [digest.hex() for digest in notes.before]
    fields = [score, before, notes.inter, notes.per_token, notes.impact]
    put_checksummed(txn, _TABLE, key, json_bytes(fields))


def find(txn: Transaction, key: ChunkKey) -> list[Variant]:
    """See :meth:`ChunkStore.variants`."""
    found = []
    for digest in digests_of_content(txn, key.content):
        header = decode_header(txn.get("headers", digest) or b"")
        if not isinstance(header, Header) or (read := _read(txn, digest)) is None:
            continue
        mine = ChunkKey(key.fingerprint, key.tokens, (), header.mode, key.tenant)
        if header.foreign(mine) is None and len(read[0].per_token) == len(key.tokens):
            found.append(Variant(header.stored(mine), *read))
    return found


def add_score(txn: Transaction, key: ChunkKey, score: float) -> None:
    """Add to the score of a variant; one that is gone or damaged is passed over."""
    if (read := _read(txn, key.digest)) is not None:
        put(txn, key.digest, read[0], read[1] + score)


def _read(txn: Transaction, digest: bytes) -> tuple[ChunkNotes, float] | None:
    """Notes and score; None where there are none, or they are damaged."""
    try:
        score, before, *rest = json.loads(get_checksummed(txn, _TABLE, digest))
    except (KeyError, StoreError):
        return None
    inter, per_token, impact = rest
    names = tuple(map(bytes.fromhex, before))
    return ChunkNotes(names, tuple(inter), tuple(per_token), impact), score
