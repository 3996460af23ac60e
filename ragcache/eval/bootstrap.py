"""Confidence intervals by resampling whole clusters (the cluster, or block, bootstrap).

Questions over one context are not independent: what helps one helps the others. So contexts are
drawn with replacement, each with all its questions, and a statistic is taken of every draw; the
interval is where the middle 95 % of them lie (percentile bootstrap; Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13). A statistic of several modes sees the same draw of
all of them: differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
_BLOCK = 500  # resamples drawn at once: bounds the memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and the interval that holds it at 95 %, or None where it cannot be told."""

    value: float
    interval: tuple[float, float] | None

    @property
    def half_width(self) -> float | None:
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


@dataclass(frozen=True)
class Bootstrap:
    """Sums over clusters, of all of them and of as many drawn with replacement, many times.

    A statistic is a function of sums, (..., *shape) to (..., n): shares are sums divided by others.
    The same ``seed`` draws the same clusters.
    """

    totals: Array  # (clusters, *shape), summed over each cluster's members
    resamples: int = 10_000
    seed: int = 0

    def estimate(self, statistic: Callable[[Array], Array]) -> list[Estimate]:
        """The ``n`` numbers of ``statistic`` for the whole, each with its interval.

        There is no interval with fewer than two clusters, nor where more draws than the interval
        leaves out leave the number undefined (NaN): it would have no end. Where all members agree
        the interval has no width, which understates what is not known.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            values, found = statistic(self.totals.sum(0)), statistic(self.drawn)
        enough = len(self.totals) > 1
        return [
            Estimate(float(value), _middle(column) if enough else None)
            for value, column in zip(values, found.T, strict=True)
        ]

    @cached_property
    def drawn(self) -> Array:
        """Sums of every resample, (resamples, *shape)."""
        random, clusters = np.random.default_rng(self.seed), len(self.totals)
        even = np.full(clusters, 1 / clusters)
        sizes = [min(_BLOCK, self.resamples - at) for at in range(0, self.resamples, _BLOCK)]
        times = (random.multinomial(clusters, even, size).astype(np.float64) for size in sizes)
        return np.concatenate([np.tensordot(t, self.totals, 1) for t in times])


def _middle(column: Array) -> tuple[float, float] | None:
    """Where the middle 95 % of the draws lie."""
    known, tail = column[~np.isnan(column)], (1 - CONFIDENCE) / 2
    if len(known) < (1 - tail) * len(column):
        return None
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
