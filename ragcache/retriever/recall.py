"""How many of the nearest vectors an approximate index finds, measured on the store's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ragcache.retriever.index import Ids, Vectors
from ragcache.retriever.searched_catalog import SearchedCatalog, vectors_there

NEAREST = 10  # recall@10
_ROUNDING = 1e-5  # of scores in float32


class RecallSample:
    """Some stored vectors as queries, (q, dimension), of rows (q,), and the scores of the vectors
    that are nearest to each, other than itself.

    Exact search takes place while the index is built: :meth:`see` is given every vector once.
    """

    def __init__(self, rows: Ids, queries: Vectors) -> None:
        self.rows, self.queries = rows, queries
        self.nearest = np.full((len(rows), NEAREST), -np.inf, np.float32)  # scores, in no order

    def see(self, rows: Ids, vectors: Vectors) -> None:
        """Take vectors (n, dimension) of rows (n,) into account."""
        scores = self.queries @ vectors.T
        scores[self.rows[:, None] == rows[None]] = -np.inf
        every = np.concatenate([self.nearest, scores], axis=1)
        self.nearest = np.partition(every, -NEAREST, axis=1)[:, -NEAREST:]

    def recall(self, catalog: SearchedCatalog, candidates: Callable[[Vectors, int], Ids]) -> float:
        """The mean share of the ten nearest that are among the ``candidates`` of a query, a
        function of the query (dimension,) and of how many are wanted.

        Candidates are scored exactly, so those that are nearest come first. One that is as near as
        the tenth counts as one of the ten, whatever its row.
        """
        shares = []
        for row, query, best in zip(self.rows.tolist(), self.queries, self.nearest, strict=True):
            best = best[np.isfinite(best)]
            if not len(best):
                continue
            found = candidates(query, NEAREST + 1)
            _, vectors = vectors_there(catalog, found[found != row])
            near = (vectors @ query >= best.min() - _ROUNDING).sum() if len(vectors) else 0
            shares.append(min(1.0, float(near) / len(best)))
        return float(np.mean(shares)) if shares else 1.0
