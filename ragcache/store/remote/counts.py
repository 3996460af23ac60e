"""A thread-safe counter of events by name."""

from __future__ import annotations

import threading
from collections import Counter


class EventCounts:
    """Counts of events since this was made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, what: str, more: int = 1) -> None:
        with self._lock:
            self._counts[what] += more

    def snapshot(self) -> Counter[str]:
        """A copy of the counts."""
        with self._lock:
            return self._counts.copy()
