"""How many of the nearest vectors an approximate index finds, measured on the store's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ragcache.retriever.index import Ids, Vectors
from ragcache.retriever.searched_catalog import SearchedCatalog, vectors_there

NEAREST = 10  # recall@10
_ROUNDING = 1e-5  # of scores in float32


class RecallSample:
    """Queries, (q, dimension), and the scores of the vectors that are nearest to each, (q, 10).

    They are held back from an index while it is measured: a vector that is in a graph leads to its
    neighbours, so those of stored vectors are found more easily than those of new ones.
    """

    def __init__(self, queries: Vectors) -> None:
        self.queries = queries
        self.nearest = np.full((len(queries), NEAREST), -np.inf, np.float32)  # in no order

    def see(self, vectors: Vectors) -> None:
        """Take vectors (n, dimension) into account. Exact search takes place here, while an index
        is built: every vector is seen once."""
        every = np.concatenate([self.nearest, self.queries @ vectors.T], axis=1)
        self.nearest = np.partition(every, -NEAREST, axis=1)[:, -NEAREST:]

    def recall(self, catalog: SearchedCatalog, candidates: Callable[[Vectors, int], Ids]) -> float:
        """The mean share of the ten nearest that are among the ``candidates`` of a query, a
        function of the query (dimension,) and of how many are wanted.

        Candidates are scored exactly, so those that are nearest come first. One that is as near as
        the tenth counts as one of the ten, whatever its row.
        """
        shares = []
        for query, scores in zip(self.queries, self.nearest, strict=True):
            best = scores[np.isfinite(scores)]
            if not len(best):
                continue
            _, vectors = vectors_there(catalog, candidates(query, NEAREST))
            near = (vectors @ query >= best.min() - _ROUNDING).sum() if len(vectors) else 0
            shares.append(min(1.0, float(near) / len(best)))
        return float(np.mean(shares)) if shares else 1.0
