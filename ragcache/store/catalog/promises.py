"""Promises: the place of accepted, pending writes of documents in the order of writes.

A job that will add documents makes a promise for each, all under one number. Putting or deleting a
document removes the promises made for it before, in the same commit; the job puts a document only
where its own promise is still valid, and removes the promise in the same commit. So the later of
two acknowledged writes wins, whichever is carried out first and whatever is killed in between, and
nothing has to be recorded about deleted documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ragcache.store.catalog.documents import document_key
from ragcache.store.lmdb.tables import get_counter, set_counter
from ragcache.text import whole

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_TABLE = "promises"


def make(txn: Transaction, document_ids: Iterable[str]) -> int:
    """Promise to write these documents; the number of the promise, higher than all before."""
    promise = get_counter(txn, "promises") + 1
    set_counter(txn, "promises", promise)
    for document_id in document_ids:
        txn.put(_TABLE, _row(document_id, promise), b"")
    return promise


def any_valid(txn: Transaction, document_id: str) -> bool:
    """Whether any promise for the document is valid."""
    return any(True for _ in txn.keys(_TABLE, document_key(whole(document_id))))


def is_valid(txn: Transaction, document_id: str, promise: int) -> bool:
    """Whether the document was not put or deleted since the promise."""
    return txn.view(_TABLE, _row(document_id, promise)) is not None


def supersede(txn: Transaction, document_id: str, promise: int | None = None) -> bool:
    """Remove the promises for a document that is being written: those up to ``promise``, by default
    all; True if there were any."""
    rows = list(txn.keys(_TABLE, document_key(whole(document_id))))
    gone = [row for row in rows if promise is None or _number(row) <= promise]
    for row in gone:
        txn.delete(_TABLE, row)
    return bool(gone)


def withdraw(txn: Transaction, document_ids: Iterable[str], promise: int) -> None:
    """Remove a promise for these documents."""
    for document_id in document_ids:
        txn.delete(_TABLE, _row(document_id, promise))


def numbers(txn: Transaction) -> set[int]:
    """The numbers of all promises that are valid for any document."""
    return {_number(row) for row in txn.keys(_TABLE)}


def withdraw_all(txn: Transaction, gone: set[int]) -> None:
    """Remove promises by their numbers, for all documents."""
    for row in [row for row in txn.keys(_TABLE) if _number(row) in gone]:
        txn.delete(_TABLE, row)


def _row(document_id: str, promise: int) -> bytes:
    return document_key(whole(document_id)) + promise.to_bytes(8, "big")


def _number(row: bytes) -> int:
    return int.from_bytes(row[-8:], "big")
