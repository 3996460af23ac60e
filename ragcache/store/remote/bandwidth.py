"""How fast bytes come from a remote: measured from what is read there anyway."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite

#: Concurrent requests. More would only make the layer that is needed next share the bandwidth.
MAX_REQUESTS = 8
_AGED = 1.25  # how much slower the best time counts, with each megabyte and each latency since
_FEW = 4.0  # latencies: of a shorter time, what is left without one is mostly noise


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """A connection to a remote, as it was lately. Seconds, none of them negative."""

    latency_s: float  # of a request, until it is answered
    byte_s: float  # per byte, with :data:`MAX_REQUESTS` requests under way

    def __post_init__(self) -> None:
        if not all(isfinite(s) and s >= 0 for s in (self.latency_s, self.byte_s)):
            raise ValueError(f"{self} cannot be: give 0 or more seconds")

    def seconds(self, requests: int, size: int) -> float:
        """To read ``size`` bytes in so many requests."""
        if not requests:
            return 0.0
        return self.latency_s + max(self.latency_s * requests / MAX_REQUESTS, self.byte_s * size)


class BandwidthMeter:
    """Watches requests. Thread-safe.

    Bandwidth is that of *busy times*, from the moment that a request is under way to the moment
    that none is: what several requests share is counted once, and the time in which nobody wanted
    anything not at all. Requests also wait for each other and for this machine's cores, which is
    no property of the link: so the best of late times counts, and the later the more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._began = 0.0
        self._bytes = 0
        self._latency_s = self._byte_s = inf

    @property
    def link(self) -> LinkEstimate | None:
        """None before anything has been read."""
        with self._lock:
            if self._byte_s == inf:
                return None
            return LinkEstimate(self._latency, self._byte_s)

    @contextmanager
    def answered(self) -> Iterator[None]:
        """A request whose answer is so small that only its latency counts."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        with self._lock:
            self._latency_s = min(took, _AGED * self._latency_s)

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """A request for ``size`` bytes; one that fails takes its time and brings nothing."""
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
        """0 before any was measured."""
        return 0.0 if self._latency_s == inf else self._latency_s
