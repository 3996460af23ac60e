"""Plot quality against cost: exact match over the charged budget of each mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import cos, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, BboxBase

    from ragcache.eval.summary import ModeSummary

__all__ = ["check_plot_path", "save_plot"]

FORMATS = ".png", ".svg"
_MARKER, _FONT = 6.0, 8.0  # points
_DISTANCES = 7, 16, 26, 38, 52, 68, 86  # points from a marker's centre to its label
_ANGLES = 0, 1, 1 / 4, 3 / 4, 7 / 4, 5 / 4, 1 / 2, 3 / 2, 1 / 8, 7 / 8, 15 / 8, 9 / 8  # times pi


def check_plot_path(path: Path) -> None:
    """Raise ConfigError if :func:`save_plot` cannot write this kind of file."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"cannot draw {path}: name a file that ends in {' or '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "Plots need matplotlib, which is not installed. "
            "Run `pip install 'ragcache-fusion[plots]'`."
        )


def save_plot(datasets: Mapping[str, Sequence[ModeSummary]], path: Path) -> None:
    """Write :func:`plot_figure` to ``path``, whose suffix is one of :data:`FORMATS`."""
    plot_figure(datasets).savefig(path, dpi=200)


def plot_figure(datasets: Mapping[str, Sequence[ModeSummary]]) -> Figure:
    """A panel per data set: exact match (mean over kinds of questions) over the charged budget.

    Each mode is a labelled point with its 95 % interval. Ratios of one mode are joined by a line,
    and a dashed line marks full prefill.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4 * len(datasets), 4.8), layout="constrained")
    canvas: Any = FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(datasets), squeeze=False)[0]
    for axes, (name, figures) in zip(panels, datasets.items(), strict=True):
        _points(axes, figures)
        axes.set_title(f"{name}: {sum(figures[0].questions.values())} questions", fontsize=10)
    drawn.draw_without_rendering()  # fixes the layout that labels are placed in
    drawn.set_layout_engine("none")
    for axes, figures in zip(panels, datasets.values(), strict=True):
        _labels(axes, figures, canvas.get_renderer(), drawn.dpi / 72)
    return drawn


def _points(axes: Axes, figures: Sequence[ModeSummary]) -> None:
    colours = _colours(figures)
    for method, colour in colours.items():
        same = sorted(filter(lambda f: _method(f) == method, figures), key=_point)
        x, y = zip(*map(_point, same), strict=True)
        axes.plot(x, y, "o-", color=colour, markersize=_MARKER, linewidth=0.8)
        for f in same:
            axes.vlines(_point(f)[0], *_ends(f), color=colour, linewidth=1, alpha=0.5)
    for f in figures:
        if f.method == "full":
            axes.axhline(_point(f)[1], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.margins(0.12)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("charged budget (% of chunk tokens computed, mean over layers)")
    axes.set_ylabel("exact match (%, mean over kinds, 95 % interval)")


def _labels(axes: Axes, figures: Sequence[ModeSummary], renderer: Any, pixels: float) -> None:
    """Put every mode's name in free space near its point, with a line to it.

    ``pixels`` is the number of pixels per point.
    """
    colours = _colours(figures)
    taken = [box for f in figures for box in _marks(axes, f, pixels)]
    for f in sorted(figures, key=_point):
        x, y = axes.transData.transform(_point(f)) / pixels  # in points, as all below
        probe = axes.text(0, 0, f.mode, fontsize=_FONT)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        width, height = extent.width / pixels, extent.height / pixels
        spots = {
            (dx, dy): _box(x + dx, y + dy, width / 2, height / 2, pixels)
            for dx, dy in _spots(width / 2, height / 2)
        }
        offset = min(spots, key=lambda spot: _collisions(spots[spot], taken, axes.bbox))
        taken.append(spots[offset])
        colour = colours[_method(f)]
        axes.annotate(
            f.mode,
            _point(f),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT,
            color=colour,
            bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0},
        )


def _colours(figures: Sequence[ModeSummary]) -> dict[str, str]:
    """A colour for each method, whatever its ratio."""
    return {method: f"C{n}" for n, method in enumerate(dict.fromkeys(map(_method, figures)))}


def _spots(half_width: float, half_height: float) -> Iterator[tuple[float, float]]:
    """Possible offsets of a label's centre from its marker, nearest first."""
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = cos(pi * angle), sin(pi * angle)
            yield dx * (distance + half_width), dy * (distance + half_height)


def _marks(axes: Axes, f: ModeSummary, pixels: float) -> Iterator[Bbox]:
    """The boxes that a mode's marker and interval cover."""
    x, y = axes.transData.transform(_point(f)) / pixels
    yield _box(x, y, _MARKER / 2, _MARKER / 2, pixels)
    low, high = (axes.transData.transform((0, end))[1] / pixels for end in _ends(f))
    yield _box(x, (low + high) / 2, 1, (high - low) / 2, pixels)


def _box(x: float, y: float, half_width: float, half_height: float, pixels: float) -> Bbox:
    """A box, in pixels, around a position given in points."""
    from matplotlib.transforms import Bbox

    corners = x - half_width, y - half_height, x + half_width, y + half_height
    return Bbox.from_extents(*(pixels * c for c in corners))


def _collisions(box: Bbox, taken: Sequence[Bbox], inside: BboxBase) -> int:
    """How many boxes this one overlaps; leaving the axes counts as overlapping all."""
    leaves = not (inside.containsx(box.x0) and inside.containsx(box.x1))
    leaves |= not (inside.containsy(box.y0) and inside.containsy(box.y1))
    return box.count_overlaps(taken) + leaves * len(taken)


def _method(f: ModeSummary) -> str:
    """The mode's label without the ratio."""
    return f.mode.partition("@")[0]


def _point(f: ModeSummary) -> tuple[float, float]:
    """x and y of a mode's point, in percent."""
    return 100 * f.charged, 100 * f.mean_match.value


def _ends(f: ModeSummary) -> tuple[float, float]:
    """The ends of a mode's interval in percent; equal if there is none."""
    low, high = f.mean_match.interval or (f.mean_match.value, f.mean_match.value)
    return 100 * low, 100 * high
