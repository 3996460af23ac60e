"""Looking after every observation raises few false alarms, and notices what changes."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from ragcache.eval.change_detector import RUN_LENGTH, ChangeDetector


def first_alarm(detector: ChangeDetector, events: np.ndarray) -> int | None:
    """The number of observations up to the first alarm; None without one."""
    return next((n for n, event in enumerate(events, 1) if detector.add(bool(event))), None)


@pytest.mark.parametrize("allowed", [0.01, 0.05, 0.5, 0.95])
def test_no_bet_gains_in_the_mean_while_the_share_is_allowed(allowed: float) -> None:
    """The wealth after one observation, from 1, has the mean 1 at the allowed share."""
    wealths = []
    for event in (True, False):
        detector = ChangeDetector(allowed)
        detector.add(event)
        wealths.append(np.array(detector._wealth))
    mean = allowed * wealths[0] + (1 - allowed) * wealths[1]
    assert mean == pytest.approx(np.ones(len(mean)))


@pytest.mark.parametrize("allowed", [0.05, 0.2])
def test_false_alarms_are_rare(allowed: float) -> None:
    """At the allowed share itself, of 100 times 2,000 observations: at most a fifth by theory."""
    random, alarms = np.random.default_rng(1), 0
    for _ in range(100):
        events = random.random(2000) < allowed
        alarms += first_alarm(ChangeDetector(allowed), events) is not None
    assert alarms <= 100 * 2000 / RUN_LENGTH


@pytest.mark.parametrize(("share", "most"), [(1.0, 4), (0.5, 30), (0.2, 150), (0.1, 900)], ids=str)
def test_what_exceeds_the_share_is_noticed(share: float, most: int) -> None:
    random = np.random.default_rng(2)
    found = [first_alarm(ChangeDetector(0.05), random.random(5000) < share) for _ in range(21)]
    assert None not in found and median(n for n in found if n is not None) <= most


def test_good_times_do_not_hide_what_follows() -> None:
    random, detector = np.random.default_rng(3), ChangeDetector(0.05)
    assert first_alarm(detector, random.random(20_000) < 0.01) is None
    late = first_alarm(detector, random.random(1000) < 0.3)
    assert late is not None and late < 100
    assert detector.observations == 20_000 + late and detector.events > 200


def test_the_ends_of_the_range() -> None:
    assert ChangeDetector(0.0).add(True)  # what never happens has happened
    assert first_alarm(ChangeDetector(0.0), np.zeros(1000)) is None
    assert first_alarm(ChangeDetector(1.0), np.ones(1000)) is None
