"""What an experiment found, and where it may make a mess."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_MEMORY = Path("/dev/shm")
_MOST_TOLD = 20


@dataclass(slots=True)
class Outcome:
    """``size`` says what was done, ``figures`` what was seen, ``violations`` what must not be."""

    size: str
    figures: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def told(self) -> list[str]:
        """The violations, the like of one another once and with their number."""
        lines = [f"{n} x {what}" for what, n in Counter(self.violations).most_common(_MOST_TOLD)]
        left = len(set(self.violations)) - len(lines)
        return [*lines, f"... and {left} others"] if left else lines


@dataclass(frozen=True, slots=True)
class Experiment:
    """``run(rounds, seed)``; how many rounds the table has, and how many the test suite."""

    run: Callable[[int, int], Outcome]
    full: int
    short: int


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes at the end: in memory where there is such a place.

    What a process leaves behind when it is killed is in the page cache, on a disk as in memory; in
    memory, more of a round falls on code than on waiting for the disk.
    """
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ragcache-", dir=place) as folder:
        yield Path(folder)


def counts(seen: Mapping[str, int]) -> str:
    """``right 7, miss 3``, the most frequent first."""
    return ", ".join(f"{what} {n}" for what, n in Counter(seen).most_common())
