"""The search for parameters that give wanted charged budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.budgets import TOLERANCE, Budgets, find_budgets

TARGETS = 0.05, 0.10, 0.15, 0.20


def value(mode: str) -> float:
    return float(mode.partition("=")[2].partition("+")[0])


def measure(modes: Sequence[str]) -> list[float]:
    """Charged budgets as of a model of 20 layers; that of Cache-Craft is not linear."""
    charged = []
    for mode in modes:
        ratio = value(mode)
        if mode.startswith("epic"):
            charged.append(ratio / 100)
        elif mode.startswith("cachecraft"):
            charged.append(min(0.6, ratio**2))
        else:
            charged.append(0.1 + 0.9 * ratio if "cacheblend" in mode else ratio)
    return charged


def test_each_method_gets_close_to_the_targets_that_it_can_reach() -> None:
    rounds = []

    def counted(modes: Sequence[str]) -> list[float]:
        rounds.append(modes)
        return measure(modes)

    methods = "fused", "cacheblend", "epic", "cachecraft"
    found = find_budgets(methods, TARGETS, counted, prompts=3)
    for method in methods:
        reached = TARGETS[1:] if method == "cacheblend" else TARGETS
        settings = found.found[method]
        assert list(settings) == [f"{target:.0%}" for target in reached]
        for target, setting in zip(reached, settings.values(), strict=True):
            curved = method == "cachecraft"  # interpolation may need more rounds than there are
            assert abs(setting.charged - target) <= (2 if curved else 1) * TOLERANCE
            assert measure([setting.mode]) == [setting.charged]
    assert found.least["cacheblend"] == pytest.approx(0.1045)
    assert len(rounds) <= 5
    assert found.modes["epic@5%"] == "epic:first_tokens=5"


def test_what_was_found_is_saved_and_joined(tmp_path: Path) -> None:
    one = find_budgets(["fused"], [0.1], measure, prompts=3)
    found = one | find_budgets(["epic"], [0.1], measure, prompts=3)
    assert list(found.modes) == ["fused@10%", "epic@10%"]
    found.save(tmp_path / "budgets.json")
    assert Budgets.load(tmp_path / "budgets.json") == found
