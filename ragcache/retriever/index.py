"""Nearest-neighbour search: the abstract index, and a plain NumPy index as its reference.

An index is a cache of the catalog's vectors. Its file (:mod:`ragcache.retriever.index_file`) is
verified as a whole when it is opened, and rebuilt rather than repaired.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragcache.errors import ConfigError
from ragcache.retriever import index_file

__all__ = ["NumpyIndex", "VectorIndex", "Vectors"]

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


class VectorIndex(ABC):
    """Normalised vectors with integer ids, searched by inner product (cosine similarity).

    All implementations return the same ids and scores: a score is the inner product computed in
    float64 and rounded to float32, and of equal scores the smaller id comes first. Any number of
    threads may search at once; :meth:`add` and :meth:`remove` need exclusive access.
    """

    kind: ClassVar[int]  # number of the payload format in the index file

    def __init__(self, dimension: int):
        if dimension < 1:
            raise ConfigError(f"dimension is {dimension}: it must be at least 1")
        self.dimension = dimension

    @property
    @abstractmethod
    def ids(self) -> Ids:
        """All ids, int64 (n,), ascending."""

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Add vectors (n, dimension) with ids (n,); the vector of an existing id is replaced.

        Raises ValueError, and changes nothing, for duplicate or negative ids, for other shapes, and
        for vectors that are not finite or longer than 1. Zero vectors are allowed.
        """
        new, rows = np.asarray(ids, np.int64), self._checked(vectors)
        if new.shape != (len(rows),):
            raise ValueError(f"{len(rows)} vectors but ids of shape {new.shape}")
        if len(np.unique(new)) != len(new) or (new < 0).any():
            raise ValueError("ids must be distinct and not below 0")
        self.remove(new)
        self._add(new, rows)

    @abstractmethod
    def _add(self, ids: Ids, vectors: Vectors) -> None:
        """Add checked vectors under ids that are not in the index."""

    @abstractmethod
    def remove(self, ids: ArrayLike) -> int:
        """Remove ids, ignoring unknown ones; returns how many were removed."""

    def search(
        self, queries: ArrayLike, k: int, among: ArrayLike | None = None
    ) -> tuple[Vectors, Ids]:
        """Scores and ids of the nearest vectors of each query (q, dimension), best first.

        ``among``: the ids to search, (m,); unknown ones are ignored. None: all. Both results are
        (q, min(k, number of searched vectors)): fewer than k vectors are all returned, without
        padding. Raises ConfigError for k < 1, and ValueError for queries as :meth:`add`.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: ask for at least 1")
        rows, here = self._checked(queries), None
        if among is not None:
            here = np.intersect1d(np.asarray(among, np.int64), self.ids)
        k = min(k, len(self) if here is None else len(here))
        scores, ids = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
        for at, query in enumerate(rows if k else ()):
            scores[at], ids[at] = self._search(query, k, here)
        return scores, ids

    @abstractmethod
    def _search(self, query: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        """Scores and ids, (k,) each, for one checked query (dimension,). ``among``: the ids to
        search, all of this index, ascending; k is from 1 to their number."""

    @abstractmethod
    def _write(self, file: BinaryIO) -> None:
        """Append the payload to a file."""

    @classmethod
    @abstractmethod
    def _read(cls, file: BinaryIO, header: index_file.IndexHeader) -> Self:
        """The index that :meth:`_write` wrote, of a file at the start of its payload, which ends
        with the file. Raises UnusableFile for another payload."""

    def save(self, path: Path, generation: int) -> None:
        """Write the index to one file with mode 0600, durable on return.

        The file is replaced atomically: a concurrent reader, or one after a crash, sees the old
        file or the new one. Raises OSError.
        """
        header = index_file.IndexHeader(self.kind, self.dimension, generation, len(self))
        index_file.write(path, header, self._write)

    @classmethod
    def load(cls, path: Path, *, dimension: int, generation: int) -> tuple[Self | None, str]:
        """The saved index and "", or None and the reason why the file cannot be used.

        A file can be used if it is intact and of this kind, dimension and generation. No content of
        a file raises an error: the caller rebuilds the index from the catalog.
        """
        try:
            with index_file.opened(path) as (header, file):
                check_kind(header, cls.kind, dimension)
                if header.generation != generation:
                    return None, f"it is of generation {header.generation}, not {generation}"
                return cls._read(file, header), ""
        except index_file.UnusableFile as error:
            return None, str(error)

    def _checked(self, vectors: ArrayLike) -> Vectors:
        return checked(vectors, self.dimension)


def checked(vectors: ArrayLike, dimension: int) -> Vectors:
    """Vectors (n, dimension) as they can be indexed or searched for. Raises ValueError for other
    shapes, and for vectors that are not finite or longer than 1."""
    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] != dimension:
        raise ValueError(f"vectors of shape {rows.shape}, expected (n, {dimension})")
    if not np.isfinite(rows).all():
        raise ValueError("a vector is not finite")
    if (np.einsum("nd,nd->n", rows, rows) > 1.001).any():
        raise ValueError("a vector is longer than 1: normalise vectors before indexing them")
    return rows


def check_kind(header: index_file.IndexHeader, kind: int, dimension: int) -> None:
    """Raise UnusableFile unless a file is of this kind and dimension."""
    if (header.kind, header.dimension) != (kind, dimension):
        found = f"kind {header.kind}, dimension {header.dimension}"
        raise index_file.UnusableFile(f"it is of {found}, not {kind}, {dimension}")


def inner_products(vectors: Vectors, query: Vectors) -> Vectors:
    """Inner products of vectors (n, d) with a query (d,): the scores (n,) of every index.

    They are computed row by row in float64, so that equal vectors have equal scores whatever their
    row, which a matrix product does not guarantee.
    """
    products = vectors.astype(np.float64) * query.astype(np.float64)
    scores: Vectors = products.sum(axis=1).astype(np.float32)
    return scores


def rounding(dimension: int) -> float:
    """The most by which an inner product of vectors of up to length 1 that is computed in float32
    may differ from the exact one."""
    return 2 * dimension * float(np.finfo(np.float32).eps)


def top_k(scores: Vectors, ids: Ids, k: int) -> tuple[Vectors, Ids]:
    """The k highest of scores (n,), descending, and their ids; of ties the smaller id first."""
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]


class NumpyIndex(VectorIndex):
    """Brute-force search with NumPy: the reference implementation, always installed."""

    kind = 1
    _BLOCK = 65_536  # vectors scored at once: 200 MB of float64 at 384 dimensions

    def __init__(self, dimension: int):
        super().__init__(dimension)
        self._ids: Ids = np.empty(0, np.int64)  # ascending
        self._vectors: Vectors = np.empty((0, dimension), np.float32)

    @property
    def ids(self) -> Ids:
        return self._ids

    def _add(self, ids: Ids, vectors: Vectors) -> None:
        ids = np.concatenate([self._ids, ids])
        order = np.argsort(ids)
        self._vectors = np.concatenate([self._vectors, vectors])[order]
        self._ids = ids[order]

    def remove(self, ids: ArrayLike) -> int:
        kept = ~np.isin(self._ids, np.asarray(ids, np.int64))
        self._ids, self._vectors = self._ids[kept], self._vectors[kept]
        return int(len(kept) - kept.sum())

    def _search(self, query: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        ids, vectors = self._ids, self._vectors
        if among is not None:
            ids, vectors = among, vectors[np.searchsorted(ids, among)]
        starts = range(0, len(ids), self._BLOCK)
        scores = [inner_products(vectors[at : at + self._BLOCK], query) for at in starts]
        return top_k(np.concatenate(scores), ids, k)

    def _write(self, file: BinaryIO) -> None:
        for part in (self._ids.astype("<i8"), self._vectors.astype("<f4", copy=False)):
            part.tofile(file)

    @classmethod
    def _read(cls, file: BinaryIO, header: index_file.IndexHeader) -> Self:
        count, dimension = header.vectors, header.dimension
        if header.size != count * (8 + 4 * dimension):
            raise index_file.UnusableFile("its payload is not what it says")
        index = cls(dimension)
        index._ids = np.fromfile(file, "<i8", count).astype(np.int64, copy=False)
        rows = np.fromfile(file, "<f4", count * dimension).astype(np.float32, copy=False)
        index._vectors = rows.reshape(count, dimension)
        return index
