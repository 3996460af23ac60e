"""Plot quality against cost: a measure of quality over the charged budget of each mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ragcache.eval.bootstrap import Estimate
    from ragcache.eval.summary import ModeSummary

__all__ = ["check_plot", "save_plot"]

FORMATS = ".png", ".svg"
_COLUMNS = 3  # most panels side by side
_MARKERS = "osD^v<>Phpd*8"
_FLOOR = 1e-4  # lowest value on a logarithmic axis: lower ones are drawn there


@dataclass(frozen=True, slots=True)
class _Measure:
    """What the vertical axis shows."""

    label: str
    of: Callable[[ModeSummary], Estimate | None]
    needs: str = ""  # the modes without which there is none
    percent: bool = True
    less_is_better: bool = False  # on a logarithmic axis

    def drawn(self, value: float) -> float:
        """Where a value is on the axis."""
        if self.less_is_better:
            return max(value, _FLOOR)
        return 100 * value if self.percent else value

    def better(self, value: float, other: float) -> bool:
        return value < other if self.less_is_better else value > other


MEASURES = {
    "exact_match": _Measure("exact match (%, mean over kinds)", lambda f: f.mean_match),
    "f1": _Measure("F1 (%)", lambda f: f.f1),
    "pgr": _Measure("PGR: performance gap recovered (%)", lambda f: f.pgr, "full and none"),
    "answer_top1": _Measure("same most likely token as full (%)", lambda f: f.answer_top1, "full"),
    "answer_kl": _Measure(
        "KL(full || mode) over the answer (nats)",
        lambda f: f.answer_kl,
        "full",
        percent=False,
        less_is_better=True,
    ),
}


def check_plot(path: Path, y: str = "exact_match") -> None:
    """Raise ConfigError if :func:`save_plot` cannot write this kind of file, or draw ``y``."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"cannot draw {path}: name a file that ends in {' or '.join(FORMATS)}")
    _measure(y)
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "Plots need matplotlib, which is not installed. "
            "Run `pip install 'ragcache-fusion[plots]'`."
        )


def save_plot(
    panels: Mapping[str, Sequence[ModeSummary]], path: Path, *, y: str = "exact_match"
) -> None:
    """Write :func:`plot_figure` to ``path``, whose suffix is one of :data:`FORMATS`.

    The bytes of an SVG depend only on the numbers.
    """
    from matplotlib import rc_context

    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "ragcache"}):
        plot_figure(panels, y=y).savefig(path, dpi=200, metadata=metadata)


def plot_figure(panels: Mapping[str, Sequence[ModeSummary]], *, y: str = "exact_match") -> Figure:
    """A panel for each title, such as a data set: ``y``, a key of :data:`MEASURES`, over the
    charged budget.

    Each mode is a point with its 95 % interval, and each method has one colour and marker in all
    panels. The line is the Pareto front: the best of the modes up to each budget. Modes full and
    none are horizontal lines. Raises ConfigError for an unknown ``y``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = _measure(y)
    columns = len(panels) if len(panels) <= _COLUMNS else min(_COLUMNS, ceil(sqrt(len(panels))))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(max(6.0, 4.4 * columns), 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(drawn)
    places = drawn.subplots(rows, columns, squeeze=False).flatten()
    styles = _styles(f for figures in panels.values() for f in figures)
    for axes, (title, figures) in zip(places, panels.items(), strict=False):
        questions = sum(figures[0].questions.values())
        axes.set_title(f"{title}: {questions} questions", fontsize=10)
        _draw(axes, figures, measure, styles)
    for axes in places[len(panels) :]:
        axes.remove()
    drawn.supxlabel("charged budget (% of chunk tokens computed, mean over layers)", fontsize=10)
    drawn.supylabel(measure.label, fontsize=10)
    named: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    drawn.legend(
        list(named.values()), list(named), loc="outside right upper", frameon=False, fontsize=9
    )
    return drawn


def _measure(y: str) -> _Measure:
    if y not in MEASURES:
        raise ConfigError(f"cannot draw {y!r}: use one of {', '.join(MEASURES)}")
    return MEASURES[y]


def _styles(figures: Iterable[ModeSummary]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method."""
    methods = dict.fromkeys(_method(f) for f in figures if f.method not in ("full", "none"))
    return {
        method: {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}
        for number, method in enumerate(methods)
    }


def _method(f: ModeSummary) -> str:
    """The mode's label without its ratio, and without parameters that are numbers."""
    name, _, parameters = f.mode.partition("@")[0].partition(":")
    kept = [text for text in parameters.split(",") if not _is_number(text.partition("=")[2])]
    return ":".join(filter(None, [name, ",".join(kept)]))


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return not text


def _draw(
    axes: Axes,
    figures: Sequence[ModeSummary],
    measure: _Measure,
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """One panel; or, if no mode has the measure, why."""
    known = [(f, found) for f in figures if (found := measure.of(f)) is not None]
    if not known:
        axes.text(0.5, 0.5, _missing(figures[0], measure), ha="center", va="center")
        axes.set_axis_off()
        return
    if measure.less_is_better:
        axes.set_yscale("log")
    points: list[tuple[float, float]] = []
    for f, found in known:
        value = measure.drawn(found.value)
        if f.method in ("full", "none"):
            if f.method == "none" or not measure.less_is_better:  # full itself diverges by 0
                style = "--" if f.method == "full" else ":"
                axes.axhline(value, color="0.5", linewidth=1, linestyle=style, label=f.method)
            continue
        x, method = 100 * f.charged, _method(f)
        points.append((x, value))
        low, high = map(measure.drawn, found.interval or (found.value, found.value))
        axes.vlines(x, low, high, color=styles[method]["color"], linewidth=1, alpha=0.5)
        axes.plot(x, value, linestyle="", markersize=6, label=method, **styles[method])
    front = _front(points, measure)
    if front:
        axes.plot(
            *zip(*front, strict=True),
            color="0.4",
            linewidth=1,
            drawstyle="steps-post",
            zorder=0,
            label="Pareto front",
        )
    axes.margins(0.08)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _front(points: Sequence[tuple[float, float]], measure: _Measure) -> list[tuple[float, float]]:
    """The points that are better than all cheaper ones, cheapest first, up to the largest x."""
    front: list[tuple[float, float]] = []
    for x, value in sorted(points, key=lambda p: (p[0], p[1] if measure.less_is_better else -p[1])):
        if not front or measure.better(value, front[-1][1]):
            front.append((x, value))
    if front:
        front.append((max(x for x, _ in points), front[-1][1]))
    return front


def _missing(f: ModeSummary, measure: _Measure) -> str:
    """Why no mode has the measure."""
    if f.gap is None:
        return f"not measured:\nit needs {measure.needs}"
    return f"no PGR: F1 of full is only\n{100 * f.gap.value:.1f} points above that of none"
