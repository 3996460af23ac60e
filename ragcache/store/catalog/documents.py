"""Records of documents, by their ids, and when the next of them expires.

``next_expiry`` among the counters is no later than the first time at which a document expires, in
milliseconds since the epoch; 0 while none ever does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from ragcache.store.format.checksummed import as_json, get_sealed, put_sealed
from ragcache.store.lmdb.counters import number, set_number
from ragcache.text import replace_surrogates

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction


@dataclass(frozen=True, slots=True)
class Entry:
    """What the catalog knows of a document."""

    id: str
    chunks: int
    metadata: Mapping[str, str]
    expires: float | None  # seconds since the epoch; None: never
    pinned: bool  # its KV is not evicted


@dataclass(frozen=True, slots=True)
class Indexed:
    """The record of a document: its entry, and where its chunks are."""

    id: str
    metadata: Mapping[str, str]
    source_digest: bytes
    rows: range  # of its chunks, in order
    expires: float | None
    pinned: bool

    @property
    def entry(self) -> Entry:
        return Entry(self.id, len(self.rows), self.metadata, self.expires, self.pinned)

    def is_over(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now


def put(txn: Transaction, document: Indexed) -> None:
    """Replaces the record of that id. The next expiry is afterwards no later than this one's."""
    fields = {
        "id": document.id,
        "metadata": dict(document.metadata),
        "digest": document.source_digest.hex(),
        "rows": [document.rows.start, len(document.rows)],
        "expires": document.expires,
        "pinned": document.pinned,
    }
    put_sealed(txn, "documents", key_of(document.id), as_json(fields))
    known = number(txn, "next_expiry")
    if document.expires is not None and (not known or _milliseconds(document.expires) < known):
        set_number(txn, "next_expiry", _milliseconds(document.expires))


def find(txn: Transaction, document_id: str) -> Indexed | None:
    """None where there is no such document. Raises StoreError where its record is damaged."""
    key = _key_of(txn, document_id)
    return None if txn.view("documents", key) is None else _read(txn, key)


def every(txn: Transaction) -> Iterator[Indexed]:
    """All documents, in no order. Raises StoreError where a record is damaged."""
    for key in txn.keys("documents"):
        yield _read(txn, key)


def remove(txn: Transaction, document_id: str) -> None:
    txn.delete("documents", _key_of(txn, document_id))


def may_be_over(txn: Transaction, now: float) -> bool:
    """Whether the time of any document may be over: cheap, and never wrongly False."""
    next_expiry = number(txn, "next_expiry")
    return bool(next_expiry) and next_expiry <= 1000 * now


def set_next_expiry(txn: Transaction) -> None:
    """Find the next expiry among all documents: after some have gone, or were given more time."""
    left = [document.expires for document in every(txn) if document.expires is not None]
    set_number(txn, "next_expiry", _milliseconds(min(left)) if left else 0)


def _read(txn: Transaction, key: bytes) -> Indexed:
    fields = json.loads(get_sealed(txn, "documents", key))
    first, count = fields["rows"]
    return Indexed(
        fields["id"],
        fields["metadata"],
        bytes.fromhex(fields["digest"]),
        range(first, first + count),
        fields["expires"],
        fields["pinned"],
    )


def _key_of(txn: Transaction, document_id: str) -> bytes:
    """The key of this very id, which old stores may have with halves of characters; else of the id
    that a :class:`Document` makes of it."""
    key = key_of(document_id)
    return (
        key if txn.view("documents", key) is not None else key_of(replace_surrogates(document_id))
    )


def key_of(document_id: str) -> bytes:
    """What a document is stored under: a digest, for ids may be longer than a key of LMDB."""
    return blake3(document_id.encode("utf-8", "surrogatepass")).digest()


def _milliseconds(when: float) -> int:
    return max(1, int(1000 * when))
