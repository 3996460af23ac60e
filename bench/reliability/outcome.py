"""The result of an experiment, and a temporary directory for it."""

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
    """``size`` is the amount of work, ``figures`` are observations, ``violations`` are failures."""

    size: str
    figures: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def grouped_violations(self) -> list[str]:
        """The violations, with similar ones grouped and counted."""
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
    """A temporary directory, in memory if possible.

    What a killed process has written is in the page cache, on a disk as in memory. In memory, a
    round spends more of its time in code than waiting for the disk.
    """
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ragcache-", dir=place) as folder:
        yield Path(folder)


def counts(seen: Mapping[str, int]) -> str:
    """``right 7, miss 3``, the most frequent first."""
    return ", ".join(f"{what} {n}" for what, n in Counter(seen).most_common())
