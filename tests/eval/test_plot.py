"""The figure of quality against cost is written completely, with every method's name in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ragcache.errors import ConfigError
from ragcache.eval import plot
from ragcache.eval.bootstrap import Estimate
from ragcache.eval.summary import ModeSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

pytest.importorskip("matplotlib")


def figure(mode: str, charged: float, match: float, **more: Any) -> ModeSummary:
    given: dict[str, Any] = {name: None for name in ModeSummary.__dataclass_fields__}
    method = mode.partition("@")[0]
    estimate = Estimate(match, (match - 0.05, match + 0.05))
    return ModeSummary(
        **given
        | {"mode": mode, "method": method, "questions": {"direct": 40, "split": 20}}
        | {"mean_match": estimate, "charged": charged}
        | more
    )


CURVE = [
    figure("none", 0.0, 0.2),
    figure("full", 1.0, 0.97),
    figure("reuse", 0.0, 0.55),
    figure("fused@0.05", 0.05, 0.94),
    figure("random@0.05", 0.05, 0.6),
    figure("random@0.15", 0.15, 0.7),
    figure("fused@0.15", 0.15, 0.97),
]


@pytest.mark.parametrize("suffix", plot.FORMATS)
def test_a_picture_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve{suffix}"
    plot.check_plot(path)
    plot.save_plot({"one": CURVE, "two": CURVE[:2]}, path)
    before = path.read_bytes()
    assert len(before) > 1000
    plot.save_plot({"one": CURVE, "two": CURVE[:2]}, path)
    assert path.read_bytes() == before  # an SVG in the repository changes only with its numbers


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of every line, by label."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.get_lines():
        xs, ys = (np.round(np.asarray(data), 6).tolist() for data in line.get_data())
        found.setdefault(str(line.get_label()), []).extend(zip(xs, ys, strict=True))
    return found


def test_methods_are_points_references_are_lines_and_the_front_is_the_best_at_each_budget() -> None:
    picture = plot.plot_figure({"one": CURVE, "two": CURVE[:3]})
    one, two = picture.axes
    assert one.get_title() == "one: 60 questions"
    drawn = lines(one)
    assert drawn["fused"] == [(5, 94), (15, 97)] and drawn["random"] == [(5, 60), (15, 70)]
    assert {y for _, y in drawn["full"]} == {97} and {y for _, y in drawn["none"]} == {20}
    assert drawn["Pareto front"] == [(0, 55), (5, 94), (15, 97), (15, 97)]
    colours = [
        {str(line.get_label()): line.get_color() for line in axes.get_lines()}["reuse"]
        for axes in (one, two)
    ]
    assert colours[0] == colours[1]
    (legend,) = picture.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == sorted(["none", "full", "reuse", "fused", "random", "Pareto front"])


def test_less_divergence_is_better_and_none_at_all_is_drawn_at_the_floor() -> None:
    kls = {"full": 0.0, "none": 5.0, "reuse": 1.0, "fused@0.05": 2.0, "fused@0.15": 1e-9}
    given = [
        figure(f.mode, f.charged, 0, answer_kl=Estimate(kls[f.mode], None))
        for f in CURVE
        if f.mode in kls
    ]
    (axes,) = plot.plot_figure({"one": given}, y="answer_kl").axes
    assert axes.get_yscale() == "log"
    drawn = lines(axes)
    assert "full" not in drawn and drawn["Pareto front"] == [(0, 1), (15, 1e-4), (15, 1e-4)]


def test_a_panel_without_the_measure_says_why() -> None:
    small = [figure("full", 1, 0.5, gap=Estimate(0.123, None))]
    picture = plot.plot_figure({"a": small, "b": CURVE, "c": CURVE, "d": CURVE}, y="pgr")
    texts = [[text.get_text() for text in axes.texts] for axes in picture.axes]
    assert texts[0] == ["no PGR: F1 of full is only\n12.3 points above that of none"]
    assert texts[3] == ["not measured:\nit needs full and none"]


def test_a_method_is_named_without_its_numbers() -> None:
    names = ["fused@0.05", "epic:first_tokens=6", "reuse:positions=overlapping", "prefix"]
    assert [plot._method(figure(name, 0, 0)) for name in names] == [
        "fused",
        "epic",
        "reuse:positions=overlapping",
        "prefix",
    ]


def test_what_cannot_be_drawn_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="name a file that ends in .png or .svg"):
        plot.check_plot(tmp_path / "curve.pdf")
    with pytest.raises(ConfigError, match="cannot draw 'speed': use one of exact_match, f1, pgr"):
        plot.check_plot(tmp_path / "curve.png", "speed")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[plots\]'"):
        plot.check_plot(tmp_path / "curve.png")
