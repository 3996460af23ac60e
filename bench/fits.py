"""Fit how a time grows with a size: log-log slope, and constant, linear and quadratic parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

POWERS = (0, 1, 2)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Of the straight line through log times over log sizes: 1 for linear, 2 for quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def parts(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, c) of a + b n + c n^2, none below 0, with the least squares of relative errors.

    Times are sums of costs, which are not negative. With three coefficients, every set of those
    that are not 0 can be tried; the best fit without a negative coefficient is returned.
    """
    scaled = np.array(sizes) / max(sizes)
    columns = np.stack([scaled**power / times for power in POWERS], 1)
    best, least = np.zeros(len(POWERS)), np.inf
    for count in POWERS:
        for kept in map(list, combinations(POWERS, count + 1)):
            found = np.linalg.lstsq(columns[:, kept], np.ones(len(times)), rcond=None)[0]
            error = float(np.square(columns[:, kept] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(len(POWERS)), error
                best[kept] = found
    a, b, c = (float(best[power]) / max(sizes) ** power for power in POWERS)
    return a, b, c
