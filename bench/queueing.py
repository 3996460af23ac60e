"""Replay of requests at one first-come-first-served server, from their service times alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ARRIVALS = 200_000  # replayed: enough for a p99 at 95 % load to stand still

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Mode:
    """What the requests took in one mode, one after another."""

    name: str
    ttft_s: list[float]  # of every request
    total_s: list[float]
    reused: float  # share of the chunks' tokens that was loaded and not computed, mean

    @property
    def saturation(self) -> float:
        """Requests per second that a server can take at most."""
        return 1 / float(np.mean(self.total_s))


def poisson(seed: int) -> Seconds:
    """Times between arrivals, at one request per second."""
    return np.random.default_rng(seed).exponential(1, ARRIVALS)


def waits(gaps: Seconds, total: Seconds) -> Seconds:
    """How long each request waits; ``gaps[n]`` is the time between the arrivals of n - 1 and n.

    Lindley's recursion in closed form: the running sum of service times minus gaps, minus its
    minimum so far.
    """
    left = np.cumsum(np.concatenate([[0.0], total[:-1] - gaps[1:]]))
    waited: Seconds = left - np.minimum.accumulate(left)
    return waited


def ttft(mode: Mode, gaps: Seconds) -> Seconds:
    """Of requests that arrive so far apart, waiting included; from the first again at the end."""
    taken, first = (np.resize(times, len(gaps)) for times in (mode.total_s, mode.ttft_s))
    found: Seconds = waits(gaps, taken) + first
    return found


def rate_within(mode: Mode, p95: float, gaps: Seconds) -> float:
    """The most requests per second at which p95 TTFT stays within ``p95`` seconds; 0 if it never
    does. ``gaps`` are those of one request per second."""
    low, high = 0.0, mode.saturation
    for _ in range(30):  # waits only grow with the rate
        rate = (low + high) / 2
        within = percentiles(ttft(mode, gaps / rate))[1] <= p95
        low, high = (rate, high) if within else (low, rate)
    return low


def percentiles(times: Sequence[float] | Seconds) -> tuple[float, float, float]:
    """p50, p95 and p99."""
    p50, p95, p99 = np.quantile(times, (0.5, 0.95, 0.99)).tolist()
    return p50, p95, p99
