"""What a reader makes of a source: its text, and what of the source is not in it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

#: What reading one document may take.
MAX_SECONDS = 60.0  # of a core
MAX_BYTES = 1 << 26  # of a file that is one document, or a line of JSON Lines


@dataclass(frozen=True, slots=True)
class Omitted:
    """A part of a source that is not in the text of its documents."""

    place: str  # the file or folder
    dropped: int
    kept: int
    unit: str  # what is counted: characters, pages, files
    why: str  # what the part is, and what to do where it is wanted

    def __str__(self) -> str:
        whole = self.dropped + self.kept
        return f"{self.place}: {self.dropped:,} of {whole:,} {self.unit} left out: {self.why}"


@dataclass(frozen=True, slots=True)
class ExtractedText:
    """The readable text of a source, ``title`` "" where it names none."""

    title: str
    text: str
    dropped: int = 0  # of ``unit``, besides what is ``kept``
    kept: int = 0
    unit: str = "characters"
    why: str = ""  # what was dropped; "" where nobody needs to be told
    metadata: dict[str, str] = field(default_factory=dict)

    def omitted(self, place: str) -> Iterable[Omitted]:
        """What is to be told of it: nothing, or one part."""
        if self.why:
            yield Omitted(place, self.dropped, self.kept, self.unit, self.why)


class LimitExceeded(Exception):
    """A document takes more than one may. The message says what of."""


class TimeLimit:
    """The time that reading a document may take, of this thread's on a core, from now on."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = MAX_SECONDS if seconds is None else seconds
        self._end = time.thread_time() + self.seconds

    def check(self) -> None:
        """Raise OverBudget where the time is over."""
        if time.thread_time() > self._end:
            raise LimitExceeded(f"it takes more than {self.seconds:g} s to read")
