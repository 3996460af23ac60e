"""Format numbers with units."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragcache.eval.bootstrap import Estimate


def size(count: float) -> str:
    """Bytes in powers of 1024, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def decimal(count: float) -> str:
    """Bytes in powers of 1000, such as ``1.5 MB``, as for prices and bandwidths."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def counted(count: int, noun: str) -> str:
    """``1 chunk``, ``2,698 chunks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """A time, such as ``2 h 5 min``, ``12 s``, ``3.4 ms`` or ``5.6 µs``."""
    units = ("d", 86400), ("h", 3600), ("min", 60), ("s", 1)
    for (unit, length), (next_unit, next_length) in pairwise(units):
        if seconds >= length:
            whole, rest = divmod(round(seconds), length)
            return f"{whole:,} {unit} {rest // next_length} {next_unit}"
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds >= 1e-3 or seconds == 0:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e6 * seconds:.1f} µs"


def estimate(found: Estimate | None, form: str) -> str:
    """An estimate with half of its interval if it has one, such as ``0.1312 ±0.0210``."""
    if found is None:
        return ""
    half = found.half_width
    return f"{found.value:{form}}" + ("" if half is None else f" ±{half:{form.lstrip('+')}}")


def percent(share: Estimate | float | None, form: str = ".1f") -> str:
    """A share in percent, with half of its interval if it has one, such as ``93.2 ±2.1``."""
    if share is None or isinstance(share, (int, float)):
        return number(None if share is None else 100 * share, form)
    text, half = number(100 * share.value, form), share.half_width
    return text if half is None else f"{text} ±{100 * half:.1f}"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
