"""Show the progress of stages: a bar for each in a terminal, else a line every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ragcache.cli.render.units import duration

#: Least and most time between lines; in between, it is a 20th of the elapsed time.
EVERY_S, AT_LEAST_EVERY_S = 5.0, 60.0
COMPUTING = "precompute"  # the stage whose progress is also counted in tokens
FILES = "files"  # the stage that the others belong to, where there are many files


@dataclass(slots=True)
class _Count:
    """The progress of one stage. Times are of a monotonic clock, in seconds."""

    began: float
    first: int  # items that were done when counting began
    done: int
    total: int
    at: float  # time of the latest update

    @property
    def rate(self) -> float | None:
        """Items per second; None before the first item."""
        spent = self.at - self.began
        return (self.done - self.first) / spent if self.done > self.first and spent > 0 else None

    def left_s(self, now: float) -> float | None:
        """Expected seconds until the end; None before the first item."""
        rate = self.rate
        if rate is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (now - self.at))


@dataclass(slots=True)
class ProgressReporter:
    """Receives the progress of named stages, and of tokens, from the functions that do the work."""

    now: Callable[[], float] = time.monotonic
    stage: str = ""  # the latest one
    _counts: dict[str, _Count] = field(default_factory=dict)
    _tokens: _Count | None = None
    _changed: Callable[[str, int, int], None] = lambda *_: None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` items of a stage. A stage without items is not shown."""
        if total == 0:
            return
        self.stage = stage
        self._counts[stage] = self._count(self._counts.get(stage), done, total)
        self._changed(stage, done, total)

    def tokens(self, done: int, total: int) -> None:
        """``done`` of ``total`` tokens whose KV is computed."""
        self._tokens = self._count(self._tokens, done, total)

    def line(self) -> str:
        """The latest stage, such as ``index: 12 of 87, 8.0 s so far, 42 s left``; "" before the
        first one. Where files are counted, they come first."""
        stages = [one for one in (FILES, self.stage) if one in self._counts]
        return "; ".join(f"{one}: {self.text(one, elapsed=True)}" for one in dict.fromkeys(stages))

    def text(self, stage: str, *, elapsed: bool = False) -> str:
        """Such as ``12 of 87, 310 tokens/s, 42 s left``; at the end, with the time it took.

        ``elapsed``: also with the time so far."""
        count = self._counts[stage]
        parts = [f"{count.done:,} of {count.total:,}"]
        pace = self._tokens if stage == COMPUTING and self._tokens else count
        if pace is self._tokens and pace.rate is not None:
            parts.append(f"{pace.rate:,.0f} tokens/s")
        if stage == FILES and pace.rate is not None:
            parts.append(f"{pace.rate:,.{0 if pace.rate >= 10 else 1}f} files/s")
        left = pace.left_s(self.now())
        if count.done >= count.total:
            parts.append(duration(count.at - count.began))
            return ", ".join(parts)
        if elapsed:
            parts.append(f"{duration(self.now() - count.began)} so far")
        if left is not None:
            parts.append(f"{duration(max(1.0, left))} left")
        return ", ".join(parts)

    def _count(self, before: _Count | None, done: int, total: int) -> _Count:
        now = self.now()
        if before is None or done < before.done:  # of the first portion, or of the next
            return _Count(now, done, done, total, now)
        return _Count(before.began, before.first, done, total, now)


@contextmanager
def progress(console: Console) -> Iterator[ProgressReporter]:
    """Show the progress that the yielded reporter receives, while the context lasts."""
    reporter = ProgressReporter()
    if not console.is_terminal:
        with _lines(console, reporter.line):
            yield reporter
        return
    stage = TextColumn("{task.description:>10}", markup=False)
    with Progress(stage, BarColumn(16), _ProgressText(reporter), console=console) as bars:
        tasks = {}

        def changed(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        reporter._changed = changed
        yield reporter


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show that ``what``, whose length is unknown, is in progress: at once in a terminal, else
    with a line every few seconds."""
    if console.is_terminal:
        with console.status(Text(what)):
            yield
        return
    began = time.monotonic()
    with _lines(console, lambda: f"{what}: {duration(time.monotonic() - began)} so far"):
        yield


@contextmanager
def _lines(console: Console, text: Callable[[], str]) -> Iterator[None]:
    """Print ``text()``, unless it is empty, every few seconds while the context lasts."""
    over, began = threading.Event(), time.monotonic()

    def run() -> None:
        while not over.wait(_pause_s(time.monotonic() - began)):
            if line := text():
                console.print(line, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _pause_s(elapsed_s: float) -> float:
    """Seconds until the next line."""
    return min(max(EVERY_S, elapsed_s / 20), AT_LEAST_EVERY_S)


class _ProgressText(ProgressColumn):
    def __init__(self, reporter: ProgressReporter) -> None:
        super().__init__()
        self.reporter = reporter

    def render(self, task: Task) -> Text:
        return Text(self.reporter.text(task.description))
