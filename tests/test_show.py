"""What people see of an answer."""

from __future__ import annotations

from ragcache.show.answers import waterfall
from ragcache.types import LayerTrace, Report


def trace(read_at: float, read: float, at: float, wait: float, compute: float) -> LayerTrace:
    return LayerTrace(4, 4, 2, 100, read_at, read, at, wait, 0.25, compute)


def report(*layers: LayerTrace) -> Report:
    return Report("fused", {}, 1, 8, 2, 6, 2, 0.15, 100, 0.0, 0.0, layers=layers)


def test_the_waterfall_shows_when_a_layer_was_read_and_computed() -> None:
    layers = trace(0.0, 0.5, 0.0, 0.5, 0.25), trace(0.5, 0.25, 1.0, 0.0, 0.75)
    assert waterfall(report(*layers), width=8) == ["░░▒█    ", "  ░ ▒███"]


def test_what_takes_no_time_is_not_drawn_and_little_is() -> None:
    layers = trace(0.0, 0.0, 0.0, 0.0, 0.001), trace(0.0, 0.0, 0.251, 0.0, 7.0)
    first, second = waterfall(report(*layers), width=10)
    assert "░" not in first + second and first.startswith("█") and "█" * 9 in second
    assert waterfall(report()) == []
