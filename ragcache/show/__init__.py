"""What people are shown in a terminal: numbers with units, progress, and, below here, tables."""

from ragcache.show.screen import Screen, one_line, plain
from ragcache.show.stages import Told, progress, waiting
from ragcache.show.units import counted, decimal, duration, number, percent, size

__all__ = [
    "Screen",
    "Told",
    "counted",
    "decimal",
    "duration",
    "number",
    "one_line",
    "percent",
    "plain",
    "progress",
    "size",
    "waiting",
]
