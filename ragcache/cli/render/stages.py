"""How far work is: a bar for each stage in a terminal, lines now and then where there is none."""

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

EVERY_S = 5.0  # between plain lines, at first; later a 20th of the time that has gone by
COMPUTING = "precompute"  # the stage in which tokens are counted


@dataclass(slots=True)
class _Count:
    """How much of something is done, and since when."""

    began: float
    first: int  # done before anybody counted
    done: int
    total: int
    at: float  # when that was told

    @property
    def rate(self) -> float | None:
        """A second; None until some of it is done."""
        spent = self.at - self.began
        return (self.done - self.first) / spent if self.done > self.first and spent > 0 else None

    def left_s(self, now: float) -> float | None:
        rate = self.rate
        if rate is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (now - self.at))


@dataclass(slots=True)
class ProgressReporter:
    """What work tells of itself: stages by name, each so much done of so much, and tokens."""

    now: Callable[[], float] = time.monotonic
    stage: str = ""  # the latest
    _counts: dict[str, _Count] = field(default_factory=dict)
    _tokens: _Count | None = None
    _changed: Callable[[str, int, int], None] = lambda *_: None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` in this stage. One that has nothing to do is not shown."""
        if total == 0:
            return
        self.stage = stage
        self._counts[stage] = self._count(self._counts.get(stage), done, total)
        self._changed(stage, done, total)

    def tokens(self, done: int, total: int) -> None:
        """Tokens whose KV was computed, of how many."""
        self._tokens = self._count(self._tokens, done, total)

    def said(self, stage: str) -> str:
        """``12 of 87, 310 tokens/s, 42 s left``; at the end, how long it took."""
        count = self._counts[stage]
        parts = [f"{count.done:,} of {count.total:,}"]
        pace = self._tokens if stage == COMPUTING and self._tokens else count
        if pace is self._tokens and pace.rate is not None:
            parts.append(f"{pace.rate:,.0f} tokens/s")
        left = pace.left_s(self.now())
        if count.done >= count.total:
            parts.append(duration(count.at - count.began))
        elif left is not None:
            parts.append(f"{duration(max(1.0, left))} left")
        return ", ".join(parts)

    def _count(self, before: _Count | None, done: int, total: int) -> _Count:
        now = self.now()
        if before is None:
            return _Count(now, done, done, total, now)
        return _Count(before.began, before.first, done, total, now)


@contextmanager
def progress(console: Console) -> Iterator[ProgressReporter]:
    """Show what is told for as long as the ``with`` lasts; hand what it yields to the work."""
    told = ProgressReporter()
    if not console.is_terminal:
        with _lines(console, lambda: told.stage and f"{told.stage}: {told.said(told.stage)}"):
            yield told
        return
    stage = TextColumn("{task.description:>10}", markup=False)
    with Progress(stage, BarColumn(16), _ProgressText(told), console=console) as bars:
        tasks = {}

        def changed(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        told._changed = changed
        yield told


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Say ``what`` is under way, whose end nobody can tell: at once in a terminal, and after some
    seconds where there is none."""
    if console.is_terminal:
        with console.status(Text(what)):
            yield
        return
    began = time.monotonic()
    with _lines(console, lambda: f"{what}: {duration(time.monotonic() - began)} so far"):
        yield


@contextmanager
def _lines(console: Console, said: Callable[[], str]) -> Iterator[None]:
    """Print what is ``said``, unless it is empty, every few seconds until the ``with`` ends."""
    over, began = threading.Event(), time.monotonic()

    def run() -> None:
        while not over.wait(max(EVERY_S, (time.monotonic() - began) / 20)):
            if line := said():
                console.print(line, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _ProgressText(ProgressColumn):
    def __init__(self, told: ProgressReporter) -> None:
        super().__init__()
        self.told = told

    def render(self, task: Task) -> Text:
        return Text(self.told.said(task.description))
