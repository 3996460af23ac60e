"""The figure of quality against cost is written completely, with every mode's name in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragcache.errors import ConfigError
from ragcache.eval import plot
from ragcache.eval.bootstrap import Estimate
from ragcache.eval.summary import ModeSummary

pytest.importorskip("matplotlib")


def figure(mode: str, charged: float, match: float) -> ModeSummary:
    given: dict[str, Any] = {name: None for name in ModeSummary.__dataclass_fields__}
    method = mode.partition("@")[0]
    estimate = Estimate(match, (match - 0.05, match + 0.05))
    return ModeSummary(
        **given
        | {"mode": mode, "method": method, "questions": {"direct": 40, "split": 20}}
        | {"mean_match": estimate, "charged": charged}
    )


CURVE = [
    figure("full", 1.0, 0.97),
    figure("reuse", 0.0, 0.55),
    figure("fused@0.05", 0.05, 0.94),
    figure("fused@0.15", 0.15, 0.97),
]


@pytest.mark.parametrize("suffix", plot.FORMATS)
def test_a_picture_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve{suffix}"
    plot.check_plot_path(path)
    plot.save_plot({"one": CURVE, "two": CURVE[:2]}, path)
    assert path.stat().st_size > 1000


def test_every_mode_is_named_once_a_panel_and_labels_do_not_cover_each_other() -> None:
    picture = plot.plot_figure({"one": CURVE})
    (axes,) = picture.axes
    labels = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in labels) == sorted(f.mode for f in CURVE)
    assert axes.get_title() == "one: 60 questions"
    boxes = [text.get_window_extent() for text in labels]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # with itself


def test_what_cannot_be_drawn_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="name a file that ends in .png or .svg"):
        plot.check_plot_path(tmp_path / "curve.pdf")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[plots\]'"):
        plot.check_plot_path(tmp_path / "curve.png")


def test_a_point_without_an_interval_has_ends_all_the_same() -> None:
    alone = SimpleNamespace(mean_match=Estimate(0.5, None))
    assert plot._ends(alone) == (50, 50)  # type: ignore[arg-type]
