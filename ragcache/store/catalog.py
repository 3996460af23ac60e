"""What was indexed: documents, the texts of their chunks, and their vectors.

Lives in the same tables as the KV, so that a store is one directory. Every chunk has a row: an
integer that is never given twice, which is also its id in the vector index. Deleting a document
deletes no KV: KV is named by content and may serve other documents.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ragcache.errors import ConfigError
from ragcache.store.sealed import as_json, get_sealed, put_sealed
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from ragcache.store.tables import Tables, Transaction

_NUMBER = struct.Struct("<Q")
_FLOATS = np.dtype("<f4")


class HasTables(Protocol):
    """A store whose directory, or memory, a catalog can share."""

    @property
    def tables(self) -> Tables: ...


class Catalog:
    """Documents and chunks beside the KV of ``store``, which closes it. Thread-safe.

    ``generation`` changes with every change of documents: an index that was built at another
    generation is out of date. Records carry checksums; a damaged one raises StoreError.
    """

    def __init__(self, store: HasTables) -> None:
        self._tables = store.tables

    def put_document(
        self,
        document: Document,
        chunks: Sequence[Chunk],
        vectors: NDArray[np.float32],
        source_digest: bytes,
    ) -> list[int]:
        """Replace a document and its chunks, all or nothing; durable on return. Gives their rows.

        ``vectors`` is (len(chunks), dimension). ``source_digest`` is for the caller: whatever
        tells that the document need not be indexed again. Raises ConfigError for vectors of
        another dimension than those that are there.
        """
        _check(document, chunks, vectors)
        with self._tables.write() as txn:
            _remove(txn, document.id)
            if chunks:
                _claim_dimension(txn, vectors.shape[1])
            first = _number(txn, "next_row")
            rows = list(range(first, first + len(chunks)))
            _set_number(txn, "next_row", first + len(chunks))
            for row, chunk, vector in zip(rows, chunks, vectors, strict=True):
                fields = [chunk.document, chunk.ordinal, chunk.text, dict(chunk.metadata)]
                put_sealed(txn, "chunks", _row_key(row), as_json(fields))
                put_sealed(txn, "vectors", _row_key(row), vector.astype(_FLOATS).tobytes())
            entry = {
                "id": document.id,
                "metadata": dict(document.metadata),
                "digest": source_digest.hex(),
                "rows": [first, len(chunks)],
            }
            put_sealed(txn, "documents", _document_key(document.id), as_json(entry))
            _set_number(txn, "generation", _number(txn, "generation") + 1)
        return rows

    def delete_document(self, document_id: str) -> bool:
        """Remove a document and its chunks; True if it was there."""
        with self._tables.write() as txn:
            found = _remove(txn, document_id)
            if found:
                _set_number(txn, "generation", _number(txn, "generation") + 1)
        return found

    def document_digest(self, document_id: str) -> bytes | None:
        """The ``source_digest`` it was put with; None where there is no such document."""
        with self._tables.read() as txn:
            entry = _entry(txn, document_id)
        return None if entry is None else bytes.fromhex(entry["digest"])

    def documents(self) -> list[str]:
        """Ids of all documents, sorted."""
        with self._tables.read() as txn:
            keys = txn.keys("documents")
            return sorted(json.loads(get_sealed(txn, "documents", key))["id"] for key in keys)

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in order; empty where there is no such document."""
        with self._tables.read() as txn:
            entry = _entry(txn, document_id)
        if entry is None:
            return []
        first, count = entry["rows"]
        return list(range(first, first + count))

    def chunk(self, row: int) -> Chunk:
        """Raises KeyError for a row whose document was replaced or deleted."""
        return self.chunks([row])[0]

    def chunks(self, rows: Iterable[int]) -> list[Chunk]:
        """One chunk per row, in the order asked, all of one state of the catalog."""
        with self._tables.read() as txn:
            return [
                Chunk(*json.loads(get_sealed(txn, "chunks", _row_key(int(row))))) for row in rows
            ]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows, ascending, (n,), and their vectors, (n, dimension): to rebuild an index."""
        with self._tables.read() as txn:
            count = txn.count("vectors")
            dimension = _number(txn, "dimension") if count else 0
            rows = np.empty(count, np.int64)
            vectors = np.empty((count, dimension), np.float32)
            for at, key in enumerate(txn.keys("vectors")):
                rows[at] = int.from_bytes(key, "big")
                vectors[at] = np.frombuffer(get_sealed(txn, "vectors", key), _FLOATS)
        return rows, vectors

    @property
    def generation(self) -> int:
        """Changes of documents so far."""
        with self._tables.read() as txn:
            return _number(txn, "generation")

    @property
    def dimension(self) -> int | None:
        """Length of every vector; None while there are none, and any is welcome."""
        with self._tables.read() as txn:
            return _number(txn, "dimension") if txn.count("vectors") else None

    def get_setting(self, name: str) -> str | None:
        """What ``put_setting`` recorded, such as the embedder's name."""
        with self._tables.read() as txn:
            value = txn.get("settings", name.encode())
        return None if value is None else value.decode()

    def put_setting(self, name: str, value: str) -> None:
        """Record a small text. ``name``: 1 to 511 bytes of UTF-8."""
        if not 0 < len(name.encode()) <= 511:
            raise ValueError(f"a setting's name takes 1 to 511 bytes, not {len(name.encode())}")
        with self._tables.write() as txn:
            txn.put("settings", name.encode(), value.encode())


def _check(document: Document, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or len(vectors) != len(chunks) or (chunks and not vectors.shape[1]):
        raise ValueError(f"{len(chunks)} chunks but vectors of shape {vectors.shape}")
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of {document.id} must be finite float32")
    strangers = {chunk.document for chunk in chunks} - {document.id}
    if strangers:
        raise ValueError(f"chunks of {', '.join(sorted(strangers))} put under {document.id}")


def _claim_dimension(txn: Transaction, dimension: int) -> None:
    known = _number(txn, "dimension")
    if txn.count("vectors") and dimension != known:
        raise ConfigError(
            f"vectors of dimension {dimension}, the catalog holds dimension {known}: use the "
            "embedder it was made with, or index everything again"
        )
    _set_number(txn, "dimension", dimension)


def _remove(txn: Transaction, document: str) -> bool:
    entry = _entry(txn, document)
    if entry is None:
        return False
    first, count = entry["rows"]
    for row in range(first, first + count):
        txn.delete("chunks", _row_key(row))
        txn.delete("vectors", _row_key(row))
    return txn.delete("documents", _document_key(document))


def _entry(txn: Transaction, document: str) -> dict[str, Any] | None:
    key = _document_key(document)
    if txn.view("documents", key) is None:
        return None
    entry: dict[str, Any] = json.loads(get_sealed(txn, "documents", key))
    return entry


def _document_key(document: str) -> bytes:
    """A digest, for ids may be longer than a key of LMDB."""
    return blake3(document.encode("utf-8", "surrogatepass")).digest()


def _row_key(row: int) -> bytes:
    if row < 0:  # what vector indexes give where they found too little
        raise ValueError(f"row {row}: rows count from 0")
    return row.to_bytes(8, "big")


def _number(txn: Transaction, name: str) -> int:
    record = txn.get("counters", name.encode())
    return int(_NUMBER.unpack(record)[0]) if record else 0


def _set_number(txn: Transaction, name: str, value: int) -> None:
    txn.put("counters", name.encode(), _NUMBER.pack(value))
