"""Approximate search of a catalog whose scores are exact.

FAISS finds candidates, and their vectors are read from the catalog to score them. So a row that was
deleted is never found, and scores and the order of ties are those of an exact index; only what is
not among the candidates can be missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from ragcache.errors import ConfigError
from ragcache.retriever.fresh_rows import FreshRows
from ragcache.retriever.index import Ids, VectorIndex, Vectors, checked, inner_products, top_k
from ragcache.retriever.searched_catalog import SearchedCatalog, vectors_there

_BLOCK = 8192  # rows whose vectors are read, and scored, at once
_FEW = 64  # rows that are all scored, instead of those that are among the best by rough scores
_WORN = 0.1  # share of an index that is new or deleted, from which it is built again


class Base(Protocol):
    """An index of the rows that the catalog had at one time, in which deleted rows remain."""

    @property
    def kind(self) -> str: ...

    @property
    def rows(self) -> Ids:
        """Ascending, (n,)."""
        ...

    @property
    def end(self) -> int:
        """The first row that it does not know."""
        ...

    @property
    def error(self) -> float | None:
        """The most by which rough scores differ from exact ones; None: there are none."""
        ...

    def __len__(self) -> int: ...

    def rough(self, query: Vectors, k: int, among: Ids) -> tuple[Vectors, Ids]:
        """Rough scores and rows of the ``k`` nearest of some of its rows, best first."""
        ...

    def fetched(self, k: int, times: int = 1) -> int: ...

    def candidates(self, query: Vectors, k: int, times: int = 1) -> Ids:
        """Up to ``fetched`` rows that the ``k`` nearest to a query are likely among."""
        ...


@dataclass(frozen=True)
class ExactBase:
    """An exact index as the base, until another one is built."""

    index: VectorIndex
    kind: str
    error = 0.0

    @cached_property
    def rows(self) -> Ids:
        return self.index.ids

    @property
    def end(self) -> int:
        return int(self.rows[-1]) + 1 if len(self.rows) else 0

    def __len__(self) -> int:
        return len(self.index)

    def rough(self, query: Vectors, k: int, among: Ids) -> tuple[Vectors, Ids]:
        scores, found = self.index.search(query[None], k, among)
        return scores[0], found[0]

    def fetched(self, k: int, times: int = 1) -> int:
        return min(len(self), k * times)

    def candidates(self, query: Vectors, k: int, times: int = 1) -> Ids:
        found: Ids = self.index.search(query[None], self.fetched(k, times))[1][0]
        return found


@dataclass(frozen=True)
class ApproximateIndex:
    """A base, and the rows that were added since, which are searched exactly.

    An index does not change; :meth:`extended` makes the next one. It may be searched by any number
    of threads, also while rows are deleted.
    """

    catalog: SearchedCatalog
    base: Base
    fresh: FreshRows
    gone: set[int] = field(default_factory=set)  # rows that were missing: they never come back

    @classmethod
    def over(cls, base: Base, catalog: SearchedCatalog, dimension: int) -> Self:
        """An index with a base and all rows that the catalog has beside it."""
        return cls(catalog, base, FreshRows(dimension)).extended()

    @property
    def dimension(self) -> int:
        return self.fresh.dimension

    def __len__(self) -> int:
        return self.catalog.size[1]

    def extended(self) -> Self:
        """With the rows that the catalog has now. Takes time in proportion to the new ones."""
        fresh, after = self.fresh, self._end - 1
        while len((block := self.catalog.vectors_after(after, _BLOCK))[0]):
            fresh = fresh.extended(block[0], checked(block[1], self.dimension))
            after = int(block[0][-1])
        return replace(self, fresh=fresh)

    @property
    def _end(self) -> int:
        """The first row that it does not know."""
        return int(self.fresh.rows[-1]) + 1 if len(self.fresh) else self.base.end

    @property
    def is_worn(self) -> bool:
        """Whether so much is new or deleted that the base should be built again."""
        deleted = len(self.base) + len(self.fresh) - len(self)
        return max(len(self.fresh), deleted) > _WORN * len(self.base)

    def search(
        self, queries: ArrayLike, k: int, among: ArrayLike | None = None
    ) -> tuple[Vectors, Ids]:
        """As :meth:`~ragcache.retriever.index.VectorIndex.search`, with exact scores, but without
        ``among`` some of the nearest may be missing. A search among rows is exact."""
        if k < 1:
            raise ConfigError(f"k is {k}: ask for at least 1")
        found = []
        for query in checked(queries, self.dimension):
            if among is None:
                found.append(self._nearest(query, k))
            else:
                found.append(self._best_of(np.unique(np.asarray(among, np.int64)), query, k))
        k = min((len(ids) for _, ids in found), default=0)  # rows may go between two queries
        scores = np.array([each[:k] for each, _ in found], np.float32).reshape(len(found), k)
        return scores, np.array([ids[:k] for _, ids in found], np.int64).reshape(len(found), k)

    def _nearest(self, query: Vectors, k: int) -> tuple[Vectors, Ids]:
        times = 1
        while True:
            fetch = self.base.fetched(k, times)
            if 4 * fetch >= len(self.base):  # reading all takes about as long
                every = np.concatenate([self.base.rows, self.fresh.rows])
                return self._best_of(every, query, k)
            scores, ids = self._scored(self.base.candidates(query, k, times), query)
            if len(ids) >= max(k, fetch // 2):
                break
            times *= 2  # many were deleted
        return _best([(scores, ids), *self._compared(self.fresh, self.fresh.rows, query, k)], k)

    def _best_of(self, rows: Ids, query: Vectors, k: int) -> tuple[Vectors, Ids]:
        """The best of rows, ascending, all of which are compared."""
        scored = [(np.empty(0, np.float32), np.empty(0, np.int64))]
        for part in (self.base, self.fresh):
            if len(part):
                places = np.minimum(np.searchsorted(part.rows, rows), len(part) - 1)
                there = rows[part.rows[places] == rows]
                scored += self._compared(part, there, query, k)
        return _best(scored, k)

    def _compared(
        self, part: Base | FreshRows, rows: Ids, query: Vectors, k: int
    ) -> Iterator[tuple[Vectors, Ids]]:
        """Scores and rows of those of ``rows`` that may be among the best k."""
        if part.error is None or len(rows) <= _FEW:
            yield from (
                self._scored(rows[at : at + _BLOCK], query) for at in range(0, len(rows), _BLOCK)
            )
            return
        fetch = k + 16
        while True:  # until rounding cannot bring any other row into the best k
            rough, near = part.rough(query, fetch, rows)
            scores, ids = self._scored(near, query)
            done = len(near) == len(rows)
            if done or (len(ids) >= k and top_k(scores, ids, k)[0][-1] > rough[-1] + part.error):
                yield scores, ids
                return
            fetch *= 4

    def _scored(self, rows: Ids, query: Vectors) -> tuple[Vectors, Ids]:
        """Scores and rows, (n,) each, of those that are still there."""
        if self.gone:
            rows = np.array([row for row in rows.tolist() if row not in self.gone], np.int64)
        there, vectors = vectors_there(self.catalog, rows)
        if len(there) < len(rows):
            missing = np.setdiff1d(rows, there)
            self.gone.update(missing[missing < self._end].tolist())
        if not len(there):
            return np.empty(0, np.float32), there
        return inner_products(vectors, query), there


def _best(scored: Sequence[tuple[Vectors, Ids]], k: int) -> tuple[Vectors, Ids]:
    """The k best of several scores and rows."""
    scores = np.concatenate([part for part, _ in scored])
    return top_k(scores, np.concatenate([rows for _, rows in scored]), k)
