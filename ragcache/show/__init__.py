"""What people are shown in a terminal: bars, numbers with units, and, below here, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ragcache.bootstrap import Estimate
    from ragcache.indexing import Progress as Told


@contextmanager
def progress(console: Console) -> Iterator[Told]:
    """A bar per stage, for as long as the ``with`` lasts; hand what it yields to the work."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as bars:
        stages: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if total == 0:
                return
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield told


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def decimal(count: float) -> str:
    """Bytes for people, in powers of 1000, as prices and links have them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def duration(seconds: float) -> str:
    """A time for people, in two units at most."""
    units = ("d", 86400), ("h", 3600), ("min", 60), ("s", 1)
    for (unit, length), (next_unit, next_length) in pairwise(units):
        if seconds >= length:
            whole, rest = divmod(round(seconds), length)
            return f"{whole:,} {unit} {rest // next_length} {next_unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def percent(share: Estimate | float | None, form: str = ".1f") -> str:
    """``93.2 ±2.1``: a share in percent, with half its interval where it has one."""
    if share is None or isinstance(share, (int, float)):
        return number(None if share is None else 100 * share, form)
    text, half = number(100 * share.value, form), share.half_width
    return text if half is None else f"{text} ±{100 * half:.1f}"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
