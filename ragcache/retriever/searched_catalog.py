"""The catalog as the retriever sees it, and what is made from it and kept until it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ragcache.retriever.index import Ids, Vectors
from ragcache.retriever.metadata import MetadataFilter, typed_metadata
from ragcache.types import Chunk

_T = TypeVar("_T")


class SearchedCatalog(Protocol):
    """The catalog of chunks and vectors, as the retriever uses it. A row is a chunk's number: later
    chunks have greater ones, and that of a deleted chunk is never used again."""

    @property
    def generation(self) -> int:
        """A number that grows with every change of chunks or vectors."""
        ...

    def vectors(self) -> tuple[Ids, Vectors]:
        """Rows (n,) and their normalised vectors (n, dimension)."""
        ...

    def vectors_after(self, row: int, most: int) -> tuple[Ids, Vectors]:
        """Up to ``most`` rows after row ``row``, ascending, and their vectors."""
        ...

    def rows(self) -> Ids:
        """All rows, ascending (n,)."""
        ...

    @property
    def next_row(self) -> int:
        """The row that the next chunk will get: more than every row that there was."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """The number of documents, and of rows."""
        ...

    def chunk(self, row: int) -> Chunk:
        """The chunk of a row. Raises KeyError if it was deleted."""
        ...

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in document order; [] for an unknown document."""
        ...

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        """Up to ``most`` rows after row ``after`` with their chunks, ascending."""
        ...

    def vectors_of(self, rows: Sequence[int]) -> Vectors:
        """The vectors of rows, in the order given. Raises KeyError for one that is gone."""
        ...

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        """The metadata of every document, and the rows of its chunks."""
        ...


def vectors_there(catalog: SearchedCatalog, rows: Sequence[int] | Ids) -> tuple[Ids, Vectors]:
    """Those of the rows that are still in the catalog, in the order given, and their vectors."""
    wanted = np.asarray(rows, np.int64)
    try:
        return wanted, catalog.vectors_of(wanted.tolist())
    except KeyError:  # some were deleted
        pass
    there, vectors = [], []
    for row in wanted.tolist():
        with suppress(KeyError):
            vectors.append(catalog.vectors_of([row])[0])
            there.append(row)
    found = np.stack(vectors) if vectors else np.empty((0, 0), np.float32)
    return np.array(there, np.int64), found


class OfGeneration(Generic[_T]):
    """Something made from the catalog, made anew when documents have changed."""

    def __init__(self, catalog: SearchedCatalog, make: Callable[[], _T]) -> None:
        self._catalog, self._make = catalog, make
        self._lock = Lock()
        self._current: tuple[int, _T] | None = None

    def current(self) -> _T:
        """That of the catalog's current generation, or of a later one."""
        with self._lock:
            generation = self._catalog.generation
            if self._current is None or self._current[0] != generation:
                self._current = generation, self._make()
            return self._current[1]


@dataclass(frozen=True, slots=True)
class _Described:
    """The metadata of all documents, and the rows that filters have let pass."""

    documents: Sequence[tuple[Mapping[str, Any], range]]
    passed: dict[bytes, Ids] = field(default_factory=dict)  # the last used one last


class FilteredRows:
    """The rows that filters let pass, of the catalog's current generation.

    A search with a filter is then as exact as one without: the index searches these rows alone.
    """

    _MOST = 64  # filters whose rows are kept

    def __init__(self, catalog: SearchedCatalog) -> None:
        self._lock = Lock()
        self._described = OfGeneration(
            catalog,
            lambda: _Described([(typed_metadata(m), rows) for m, rows in catalog.described()]),
        )

    def rows(self, accepted: MetadataFilter) -> Ids:
        """Rows, ascending, of the chunks of all documents that a filter lets pass."""
        with self._lock:
            described = self._described.current()
            found = described.passed.pop(accepted.digest, None)
            if found is None:
                passing = (r for metadata, r in described.documents if accepted.passes(metadata))
                found = np.sort(np.fromiter(chain.from_iterable(passing), np.int64))
            described.passed[accepted.digest] = found
            if len(described.passed) > self._MOST:
                del described.passed[next(iter(described.passed))]
            return found
