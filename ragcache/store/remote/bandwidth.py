"""Estimates latency and bandwidth of a remote from the requests that are made anyway."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite

__all__ = ["LinkEstimate"]

#: Concurrent requests. More would only make the layer that is needed next share the bandwidth.
MAX_REQUESTS = 8
_AGED = 1.25  # factor by which the best time ages with each megabyte, and each latency measured
_FEW = 4.0  # latencies; in shorter busy times, the time without one latency is mostly noise


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """Recent latency and bandwidth of a remote, in seconds, not negative."""

    latency_s: float  # of a request
    byte_s: float  # per byte, with :data:`MAX_REQUESTS` concurrent requests

    def __post_init__(self) -> None:
        if not all(isfinite(s) and s >= 0 for s in (self.latency_s, self.byte_s)):
            raise ValueError(f"{self} cannot be: give 0 or more seconds")

    def seconds(self, requests: int, size: int) -> float:
        """The time to read ``size`` bytes in ``requests`` requests."""
        if not requests:
            return 0.0
        return self.latency_s + max(self.latency_s * requests / MAX_REQUESTS, self.byte_s * size)


class BandwidthMeter:
    """Measures requests. Thread-safe.

    Bandwidth is measured over *busy times*, in which at least one request is running: concurrent
    requests count once, idle time not at all. Requests also wait for each other and for this
    machine's cores, which is no property of the link: so the best time counts, and ages.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._began = 0.0
        self._bytes = 0
        self._latency_s = self._byte_s = inf

    @property
    def link(self) -> LinkEstimate | None:
        """The estimate; None before anything was read."""
        with self._lock:
            if self._byte_s == inf:
                return None
            return LinkEstimate(self._latency, self._byte_s)

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Measure a request with a response so small that only its latency counts."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        with self._lock:
            self._latency_s = min(took, _AGED * self._latency_s)

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Measure a request for ``size`` bytes. A failed one counts its time and no bytes."""
        with self._lock:
            if not self._under_way:
                self._began, self._bytes = time.perf_counter(), 0
            self._under_way += 1
        try:
            yield
            with self._lock:
                self._bytes += size
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way and self._bytes:
                    busy = time.perf_counter() - self._began
                    if busy > _FEW * self._latency:
                        busy -= self._latency
                    aged = _AGED ** min(1.0, self._bytes / 1e6)
                    self._byte_s = min(busy / self._bytes, aged * self._byte_s)

    @property
    def _latency(self) -> float:
        """The latency; 0 before any was measured."""
        return 0.0 if self._latency_s == inf else self._latency_s
