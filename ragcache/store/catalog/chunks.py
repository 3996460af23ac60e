"""Rows: the text and the vector of every indexed chunk, under a number that is never reused.

A row is also the id in the vector index. All vectors have the dimension of the first one, as long
as there are any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError, StoreError
from ragcache.store.format.checksummed import get_checksummed, json_bytes, put_checksummed
from ragcache.store.lmdb.tables import get_counter, set_counter
from ragcache.types import Chunk

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_FLOATS = np.dtype("<f4")


def add_rows(txn: Transaction, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> range:
    """Add chunks with their vectors, (len(chunks), dimension); the rows that they get.

    Raises ConfigError for vectors of another dimension than the stored ones.
    """
    if chunks:
        _claim_dimension(txn, vectors.shape[1])
    first = next_row(txn)
    rows = range(first, first + len(chunks))
    set_counter(txn, "next_row", rows.stop)
    for row, chunk, vector in zip(rows, chunks, vectors, strict=True):
        fields = [chunk.document, chunk.ordinal, chunk.text, dict(chunk.metadata)]
        put_checksummed(txn, "chunks", row_key(row), json_bytes(fields))
        put_checksummed(txn, "vectors", row_key(row), vector.astype(_FLOATS).tobytes())
    return rows


def remove_row(txn: Transaction, row: int) -> None:
    for table in ("chunks", "vectors"):
        txn.delete(table, row_key(row))


def chunk_of(txn: Transaction, row: int) -> Chunk:
    """The chunk of a row. Raises KeyError where there is no such row, StoreError if it is
    damaged."""
    return Chunk(*json.loads(get_checksummed(txn, "chunks", row_key(row))))


def rows_after(txn: Transaction, row: int, most: int) -> Iterator[int]:
    """Up to ``most`` rows after ``row``, ascending."""
    for key in islice(txn.keys("chunks", start=row_key(row + 1)), most):
        yield _row_of(key)


def vectors_of(txn: Transaction, rows: Iterable[int]) -> NDArray[np.float32]:
    """The vectors of rows, in the order given, (rows, dimension). Raises KeyError where there is no
    such row, StoreError where one is damaged."""
    found = [get_checksummed(txn, "vectors", row_key(row)) for row in rows]
    return np.frombuffer(b"".join(found), _FLOATS).reshape(
        len(found), get_counter(txn, "dimension")
    )


def all_rows(txn: Transaction) -> NDArray[np.int64]:
    """All rows, ascending, (n,)."""
    return np.fromiter((_row_of(key) for key in txn.keys("vectors")), np.int64)


def vectors_after(
    txn: Transaction, row: int, most: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Up to ``most`` rows after ``row``, ascending, (n,), and their vectors, (n, dimension). Raises
    StoreError where one is damaged."""
    length = dimension(txn) or 0
    rows, vectors = [], []
    for key in islice(txn.keys("vectors", start=row_key(row + 1)), most):
        vector = np.frombuffer(_vector(txn, key), _FLOATS)
        if len(vector) != length:
            raise StoreError(
                f"row {_row_of(key)} in vectors has {len(vector)} numbers, not {length}: index its "
                "document again",
                reason="corrupt",
            )
        rows.append(_row_of(key))
        vectors.append(vector)
    matrix = np.array(vectors, np.float32).reshape(len(rows), length)
    return np.array(rows, np.int64), matrix


def next_row(txn: Transaction) -> int:
    """The row that the next chunk will get: more than every row that there was."""
    return get_counter(txn, "next_row")


def dimension(txn: Transaction) -> int | None:
    """The length of every vector; None while there are none."""
    return get_counter(txn, "dimension") if txn.count("vectors") else None


def row_key(row: int) -> bytes:
    """The key of a row in all tables."""
    if row < 0:  # what vector indexes return in place of missing results
        raise ValueError(f"row {row}: rows count from 0")
    return row.to_bytes(8, "big")


def _row_of(key: bytes) -> int:
    return int.from_bytes(key, "big")


def _vector(txn: Transaction, key: bytes) -> bytes:
    try:
        return get_checksummed(txn, "vectors", key)
    except KeyError as error:  # its key exists, its value does not
        raise StoreError(
            "the table of vectors is damaged: index the documents again", reason="corrupt"
        ) from error


def _claim_dimension(txn: Transaction, wanted: int) -> None:
    known = dimension(txn)
    if known is not None and wanted != known:
        raise ConfigError(
            f"vectors of dimension {wanted}, the catalog holds dimension {known}: use the "
            "embedder it was made with, or index everything again"
        )
    set_counter(txn, "dimension", wanted)
