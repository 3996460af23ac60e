"""Rows that were added after an index was built, with their vectors."""

from __future__ import annotations

from typing import Self

import numpy as np

from ragcache.retriever.index import Ids, Vectors, rounding


class FreshRows:
    """Rows (n,), ascending, and vectors (n, dimension), that are searched one by one.

    Extended ones share memory with those that they extend, which do not change: adding rows takes
    time in proportion to the new ones. Only the latest may be extended, by one thread at a time.
    """

    def __init__(self, dimension: int) -> None:
        self._rows: Ids = np.empty(0, np.int64)  # longer than what is used
        self._vectors: Vectors = np.empty((0, dimension), np.float32)
        self._used = 0

    @property
    def dimension(self) -> int:
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        return self._used

    @property
    def rows(self) -> Ids:
        return self._rows[: self._used]

    def extended(self, rows: Ids, vectors: Vectors) -> Self:
        """These and further ones, of greater rows."""
        used = self._used + len(rows)
        more = type(self)(self.dimension)
        more._rows, more._vectors, more._used = self._rows, self._vectors, used
        if used > len(self._rows):
            spare = used  # so that what is copied is less than what is added, on average
            more._rows = np.concatenate([self.rows, np.empty(spare, np.int64)])
            empty = np.empty((spare, self.dimension), np.float32)
            more._vectors = np.concatenate([self._vectors[: self._used], empty])
        more._rows[self._used : used], more._vectors[self._used : used] = rows, vectors
        return more

    @property
    def error(self) -> float:
        """The most by which scores of :meth:`rough` differ from the exact ones."""
        return rounding(self.dimension)

    def rough(self, query: Vectors, k: int, among: Ids) -> tuple[Vectors, Ids]:
        """Scores and rows of the ``k`` nearest of some of these rows, best first."""
        import faiss

        vectors = self._vectors[: self._used]
        if len(among) < self._used:
            vectors = vectors[np.searchsorted(self.rows, among)]
        metric = faiss.METRIC_INNER_PRODUCT
        scores, found = faiss.knn(query[None], vectors, min(k, len(among)), metric=metric)
        return scores[0], among[found[0]]
