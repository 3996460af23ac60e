"""Confidence intervals by resampling whole clusters (the cluster, or block, bootstrap).

Questions over the same context are not independent. So contexts are drawn with replacement, each
with all its questions, and the statistic is computed for every draw; the interval contains the
middle 95 % of the results (percentile bootstrap; Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13). A statistic of several modes uses the same draw for all of them, so
differences between modes are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate"]

Array = NDArray[np.float64]

CONFIDENCE = 0.95
_BLOCK = 500  # resamples drawn at once, which bounds the memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % confidence interval, which is None if it cannot be computed."""

    value: float
    interval: tuple[float, float] | None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


@dataclass(frozen=True)
class Bootstrap:
    """Sums over all clusters, and over many draws of as many clusters with replacement.

    A statistic maps sums (..., *shape) to (..., n), for example ratios of sums. The same ``seed``
    draws the same clusters.
    """

    totals: Array  # (clusters, *shape), summed over each cluster's members
    resamples: int = 10_000
    seed: int = 0

    def estimate(self, statistic: Callable[[Array], Array]) -> list[Estimate]:
        """The ``n`` values of ``statistic`` over all clusters, each with its interval.

        There is no interval for fewer than two clusters, nor if the value is undefined (NaN) for
        more draws than the interval leaves out on one side. If all members agree, the interval has
        zero width, which understates the uncertainty.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            values, found = statistic(self.totals.sum(0)), statistic(self.resampled)
        enough = len(self.totals) > 1
        return [
            Estimate(float(value), _percentile_interval(column) if enough else None)
            for value, column in zip(values, found.T, strict=True)
        ]

    @cached_property
    def resampled(self) -> Array:
        """The sums of every draw, (resamples, *shape)."""
        random, clusters = np.random.default_rng(self.seed), len(self.totals)
        even = np.full(clusters, 1 / clusters)
        sizes = [min(_BLOCK, self.resamples - at) for at in range(0, self.resamples, _BLOCK)]
        times = (random.multinomial(clusters, even, size).astype(np.float64) for size in sizes)
        return np.concatenate([np.tensordot(t, self.totals, 1) for t in times])


def _percentile_interval(column: Array) -> tuple[float, float] | None:
    """The interval of the middle 95 % of a statistic's values (resamples,)."""
    known, tail = column[~np.isnan(column)], (1 - CONFIDENCE) / 2
    if len(known) < (1 - tail) * len(column):
        return None
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
