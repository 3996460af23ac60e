"""Records of documents by their ids, and when the next of them expires.

The counter ``next_expiry`` is a lower bound of the time at which the next document expires, in
milliseconds since the epoch; 0 while none does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from ragcache.store.format.checksummed import get_checksummed, json_bytes, put_checksummed
from ragcache.store.lmdb.tables import get_counter, set_counter
from ragcache.text import replace_surrogates

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

__all__ = ["DocumentEntry"]


@dataclass(frozen=True, slots=True)
class DocumentEntry:
    """A document, as the catalog lists it."""

    id: str
    chunks: int
    metadata: Mapping[str, str]
    expires: float | None  # seconds since the epoch; None: never
    pinned: bool  # its KV is not evicted


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """The stored record of a document: its entry, and the rows of its chunks."""

    id: str
    metadata: Mapping[str, str]
    source_digest: bytes
    rows: range  # of its chunks, in order
    expires: float | None
    pinned: bool

    @property
    def entry(self) -> DocumentEntry:
        return DocumentEntry(self.id, len(self.rows), self.metadata, self.expires, self.pinned)

    def is_expired(self, now: float) -> bool:
        """Whether it has expired."""
        return self.expires is not None and self.expires <= now


def put(txn: Transaction, document: DocumentRecord) -> None:
    """Put the record of a document, replacing the one of its id, and update the next expiry."""
    fields = {
        "id": document.id,
        "metadata": dict(document.metadata),
        "digest": document.source_digest.hex(),
        "rows": [document.rows.start, len(document.rows)],
        "expires": document.expires,
        "pinned": document.pinned,
    }
    put_checksummed(txn, "documents", document_key(document.id), json_bytes(fields))
    known = get_counter(txn, "next_expiry")
    if document.expires is not None and (not known or _milliseconds(document.expires) < known):
        set_counter(txn, "next_expiry", _milliseconds(document.expires))


def find(txn: Transaction, document_id: str) -> DocumentRecord | None:
    """The record of a document; None where there is none. Raises StoreError if it is damaged."""
    key = _key_of(txn, document_id)
    return None if txn.view("documents", key) is None else _read(txn, key)


def all_records(txn: Transaction) -> Iterator[DocumentRecord]:
    """All records, in no particular order. Raises StoreError where one is damaged."""
    for key in txn.keys("documents"):
        yield _read(txn, key)


def remove(txn: Transaction, document_id: str) -> None:
    txn.delete("documents", _key_of(txn, document_id))


def may_have_expired(txn: Transaction, now: float) -> bool:
    """Whether any document may have expired: cheap, and never wrongly False."""
    next_expiry = get_counter(txn, "next_expiry")
    return bool(next_expiry) and next_expiry <= 1000 * now


def update_next_expiry(txn: Transaction) -> None:
    """Compute the next expiry from all documents."""
    left = [document.expires for document in all_records(txn) if document.expires is not None]
    set_counter(txn, "next_expiry", _milliseconds(min(left)) if left else 0)


def _read(txn: Transaction, key: bytes) -> DocumentRecord:
    fields = json.loads(get_checksummed(txn, "documents", key))
    first, count = fields["rows"]
    return DocumentRecord(
        fields["id"],
        fields["metadata"],
        bytes.fromhex(fields["digest"]),
        range(first, first + count),
        fields["expires"],
        fields["pinned"],
    )


def _key_of(txn: Transaction, document_id: str) -> bytes:
    """The key of this exact id, which old stores may have with lone surrogates; else that of the id
    as a :class:`Document` normalises it."""
    key = document_key(document_id)
    return (
        key
        if txn.view("documents", key) is not None
        else document_key(replace_surrogates(document_id))
    )


def document_key(document_id: str) -> bytes:
    """The key of a document: a digest, since ids may be longer than LMDB's keys."""
    return blake3(document_id.encode("utf-8", "surrogatepass")).digest()


def _milliseconds(when: float) -> int:
    return max(1, int(1000 * when))
