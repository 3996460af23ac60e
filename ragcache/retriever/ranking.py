"""Choose among chunks that were found: by several rankings, or by what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragcache.retriever.index import Vectors

#: Of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): the rank that counts half.
_RRF = 60


def fused_ranks(found: Sequence[Sequence[int]]) -> list[int]:
    """The rows of several rankings, each best first, by the sum of 1 / (60 + rank) over them; of
    ties the smaller row first. One ranking is left as it is."""
    if len(found) == 1:
        return list(found[0])
    values: dict[int, float] = {}
    for rows in found:
        for rank, row in enumerate(rows, 1):
            values[row] = values.get(row, 0.0) + 1 / (_RRF + rank)
    return sorted(values, key=lambda row: (-values[row], row))


def most_relevant_and_unlike(
    vectors: Vectors, query: Vectors, relevance: float, k: int
) -> list[int]:
    """Places of at most k of the ``vectors`` (n, d), chosen one after the other by maximal marginal
    relevance (Carbonell and Goldstein, SIGIR 1998): ``relevance`` times the similarity to the query
    (d,), minus 1 - ``relevance`` times the largest similarity to one that is chosen. Of ties the
    first."""
    alike = vectors @ vectors.T
    value = relevance * (vectors @ query)
    nearest = np.full(len(vectors), -np.inf, np.float32)  # to those that are chosen
    chosen: list[int] = []
    for _ in range(min(k, len(vectors))):
        penalty = (1 - relevance) * nearest if chosen else np.zeros_like(nearest)
        left = value - penalty
        left[chosen] = -np.inf
        chosen.append(int(left.argmax()))
        nearest = np.maximum(nearest, alike[chosen[-1]])
    return chosen
