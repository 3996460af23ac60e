"""Changes of one document, within a transaction: its record, its rows, and the KV that they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragcache.store.catalog import documents, references
from ragcache.store.catalog.chunks import add_rows, remove_row
from ragcache.store.catalog.documents import DocumentRecord
from ragcache.store.lmdb.tables import get_counter, set_counter
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from ragcache.store.base import Change
    from ragcache.store.lmdb.tables import Transaction


def check_document(
    document: Document, chunks: Sequence[Chunk], vectors: NDArray[np.float32]
) -> None:
    """Raise ValueError for chunks of another document, or vectors that cannot be theirs."""
    if vectors.ndim != 2 or len(vectors) != len(chunks) or (chunks and not vectors.shape[1]):
        raise ValueError(f"{len(chunks)} chunks but vectors of shape {vectors.shape}")
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of {document.id} must be finite float32")
    others = {chunk.document for chunk in chunks} - {document.id}
    if others:
        raise ValueError(f"chunks of {', '.join(sorted(others))} put under {document.id}")


def replace_document(
    change: Change,
    document: Document,
    chunks: Sequence[Chunk],
    vectors: NDArray[np.float32],
    source_digest: bytes,
    contents: Sequence[bytes],
    expires: float | None,
    pinned: bool,
) -> None:
    """Put a document in place of the one with its id; delete the KV that nothing uses any more."""
    txn = change.txn
    released = _remove(txn, document.id)
    rows = add_rows(txn, chunks, vectors)
    for row, content in zip(rows, contents, strict=bool(contents)):
        references.add(txn, row, content, pinned=pinned)
    metadata = dict(document.metadata)
    documents.put(txn, DocumentRecord(document.id, metadata, source_digest, rows, expires, pinned))
    references.delete_unused(change, released)
    _count_change(txn)


def delete_document(change: Change, document_id: str) -> bool:
    """Delete a document, and the KV that nothing uses any more; True if it was there."""
    if documents.find(change.txn, document_id) is None:
        return False
    references.delete_unused(change, _remove(change.txn, document_id))
    _count_change(change.txn)
    return True


def set_retention(
    txn: Transaction, document: DocumentRecord, expires: float | None, pinned: bool | None
) -> None:
    """Set when a document expires and whether it is pinned; None leaves a value as it is."""
    if expires is not None:
        document = replace(document, expires=expires)
    if pinned is not None:
        document = replace(document, pinned=pinned)
        for row in document.rows:
            references.pin(txn, row, pinned)
    documents.put(txn, document)


def _remove(txn: Transaction, document_id: str) -> set[bytes]:
    """Remove a document, if it is there; the contents that it used."""
    document = documents.find(txn, document_id)
    if document is None:
        return set()
    released = set()
    for row in document.rows:
        released.update(references.release(txn, row))
        remove_row(txn, row)
    documents.remove(txn, document_id)
    return released


def _count_change(txn: Transaction) -> None:
    set_counter(txn, "generation", get_counter(txn, "generation") + 1)
