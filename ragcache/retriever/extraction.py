"""What readers return: extracted text, what was left out of it, and limits on reading."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Limits on reading one document.
MAX_SECONDS = 60.0  # CPU time
MAX_TABLE_SECONDS = 600.0  # CPU time for a table, which is many documents
MAX_BYTES = 1 << 26  # of a file that is one document, or of a line of JSON Lines


@dataclass(frozen=True, slots=True)
class Omitted:
    """A part of a source that is not in the text of its documents."""

    place: str  # the file or folder
    dropped: int
    kept: int
    unit: str  # of ``dropped`` and ``kept``: characters, pages, files, parts, cells
    why: str  # what was left out, and how to include it

    def __str__(self) -> str:
        whole = self.dropped + self.kept
        return f"{self.place}: {self.dropped:,} of {whole:,} {self.unit} left out: {self.why}"


@dataclass(frozen=True, slots=True)
class ExtractedText:
    """The readable text of a source; ``title`` is "" if it has none."""

    title: str
    text: str
    dropped: int = 0  # in ``unit``; the rest is ``kept``
    kept: int = 0
    unit: str = "characters"
    why: str = ""  # what was dropped; "" if that is not worth reporting
    metadata: dict[str, str] = field(default_factory=dict)

    def omitted(self, place: str) -> Iterable[Omitted]:
        """What to report as left out of ``place``: nothing, or one part."""
        if self.why:
            yield Omitted(place, self.dropped, self.kept, self.unit, self.why)


class LimitExceeded(Exception):
    """A document exceeds a limit on reading; the message says which one."""


class TimeLimit:
    """A limit on this thread's CPU time, which begins when it is made."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = MAX_SECONDS if seconds is None else seconds
        self._end = time.thread_time() + self.seconds

    def check(self) -> None:
        """Raise LimitExceeded if the time is over."""
        if time.thread_time() > self._end:
            raise LimitExceeded(f"it takes more than {self.seconds:g} s to read")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within this context is not counted."""
        began = time.thread_time()
        yield
        self._end += time.thread_time() - began
