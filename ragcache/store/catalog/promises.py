"""What work that was accepted will write, unless somebody writes later.

A job that is to add documents makes a promise for each, all under one number. Whoever puts or
deletes a document takes the promises away that were made for it before, in the same commit; the job
writes a document only where its own promise still stands, and keeps it in the same commit too. So
the later of two acknowledged writes wins, whichever is carried out first, and whatever is killed in
between; and nothing has to be remembered of documents that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ragcache.store.catalog.documents import key_of
from ragcache.store.lmdb.counters import number, set_number
from ragcache.text import replace_surrogates

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

TABLE = "promises"


def make(txn: Transaction, document_ids: Iterable[str]) -> int:
    """Promise to write these; the number of this promise, higher than all before."""
    promise = number(txn, "promises") + 1
    set_number(txn, "promises", promise)
    for document_id in document_ids:
        txn.put(TABLE, _row(document_id, promise), b"")
    return promise


def any_stands(txn: Transaction, document_id: str) -> bool:
    """Whether anybody has promised to write that document."""
    return any(True for _ in txn.keys(TABLE, key_of(replace_surrogates(document_id))))


def stands(txn: Transaction, document_id: str, promise: int) -> bool:
    """Whether nobody has written that document since it was promised."""
    return txn.view(TABLE, _row(document_id, promise)) is not None


def overtake(txn: Transaction, document_id: str, promise: int | None = None) -> bool:
    """The document is written: by whoever made ``promise``, or else by whoever comes last. Takes
    away what was promised of it up to then; whether anything was."""
    rows = list(txn.keys(TABLE, key_of(replace_surrogates(document_id))))
    gone = [row for row in rows if promise is None or _number(row) <= promise]
    for row in gone:
        txn.delete(TABLE, row)
    return bool(gone)


def withdraw(txn: Transaction, document_ids: Iterable[str], promise: int) -> None:
    """What is left of a promise will not be kept."""
    for document_id in document_ids:
        txn.delete(TABLE, _row(document_id, promise))


def numbers(txn: Transaction) -> set[int]:
    """Of all promises that stand for any document."""
    return {_number(row) for row in txn.keys(TABLE)}


def withdraw_all(txn: Transaction, gone: set[int]) -> None:
    """The same, of several promises and whatever documents they are of."""
    for row in [row for row in txn.keys(TABLE) if _number(row) in gone]:
        txn.delete(TABLE, row)


def _row(document_id: str, promise: int) -> bytes:
    return key_of(replace_surrogates(document_id)) + promise.to_bytes(8, "big")


def _number(row: bytes) -> int:
    return int.from_bytes(row[-8:], "big")
