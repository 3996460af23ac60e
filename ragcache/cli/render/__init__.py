"""Text for terminals: numbers with units, progress, tables, and text without control characters."""

from ragcache.cli.render.screen import Screen, one_line, plain
from ragcache.cli.render.stages import ProgressReporter, progress, waiting
from ragcache.cli.render.units import counted, decimal, duration, estimate, number, percent, size

__all__ = [
    "Screen",
    "ProgressReporter",
    "counted",
    "decimal",
    "duration",
    "estimate",
    "number",
    "one_line",
    "percent",
    "plain",
    "progress",
    "size",
    "waiting",
]
