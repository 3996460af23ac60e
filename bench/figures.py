"""Curves for docs/benchmarks.md: needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One pair of axes and the curves on it."""

    title: str
    x: str  # label of the horizontal axis
    y: str  # label of the vertical axis
    curves: Mapping[str, Sequence[tuple[float, float]]]  # label -> points, from left to right
    log: str = ""  # the axes that are logarithmic: "", "x", "y" or "xy"


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, as an SVG whose bytes depend only on the numbers.

    A label has one colour in all panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = dict.fromkeys(label for panel in panels for label in panel.curves)
    colours = {label: f"C{n}" for n, label in enumerate(labels)}
    with rc_context({"svg.hashsalt": "ragcache", "svg.fonttype": "none"}):
        picture = Figure(figsize=(max(6, 4.2 * len(panels)), 4), layout="constrained")
        places = picture.subplots(1, len(panels), squeeze=False)[0]
        drawn = {}
        for axes, panel in zip(places, panels, strict=True):
            for label, points in panel.curves.items():
                xs, ys = zip(*points, strict=True)
                [drawn[label]] = axes.plot(xs, ys, ".-", color=colours[label], linewidth=1)
            _scale(axes, panel)
        picture.legend(
            drawn.values(), drawn, loc="outside lower center", ncols=len(drawn), frameon=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, format="svg", metadata={"Date": None})


def _scale(axes: Axes, panel: Panel) -> None:
    """Names, scales and grid; numbers on a logarithmic axis are written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if "x" in panel.log:
        axes.set_xscale("log")
        axes.set_xticks(sorted({x for points in panel.curves.values() for x, _ in points}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if "y" in panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
