"""Intervals: compared with those of the binomial distribution, and clusters drawn as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from ragcache.eval.bootstrap import Array, Bootstrap


def share(sums: Array) -> Array:
    """Of totals (clusters, 2): right answers over questions asked."""
    return sums[..., :1] / sums[..., 1:]


def totals(right: list[float], asked: list[float]) -> Array:
    return np.array([right, asked], float).T


def test_independent_questions_give_the_binomials_interval() -> None:
    right = [1.0] * 30 + [0.0] * 70
    (found,) = Bootstrap(totals(right, [1] * 100)).estimate(share)
    assert found.value == 0.3
    # Quantiles of Binomial(100, 0.3) at 2.5 and 97.5 %: what resampling tends to.
    assert found.interval == pytest.approx((0.21, 0.39), abs=0.005)
    assert found.half_width == pytest.approx(0.09, abs=0.005)


def test_the_mean_of_many_clusters_has_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    (found,) = Bootstrap(np.stack([values, np.ones(400)], 1)).estimate(share)
    assert found.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.03)


def test_questions_of_one_context_are_drawn_together() -> None:
    """Two contexts, one all right and one all wrong: a draw is 0, 1/2 or 1, whatever they hold."""
    two = Bootstrap(totals([50, 0], [50, 50]))
    assert set(share(two.resampled)[:, 0]) == {0, 0.5, 1}
    (found,) = two.estimate(share)
    assert (found.value, found.interval) == (0.5, (0, 1))
    # Asking everything ten times over makes nothing surer.
    once = totals([1, 0, 1, 0, 1], [1, 1, 1, 1, 1])
    assert Bootstrap(10 * once).estimate(share) == Bootstrap(once).estimate(share)


def test_sums_are_of_as_many_clusters_and_the_seed_repeats_them() -> None:
    sizes = totals([1, 2, 4], [1, 1, 1])
    one = Bootstrap(sizes, resamples=1234)
    assert one.resampled.shape == (1234, 2)
    assert (one.resampled[:, 1] == 3).all()
    assert one.resampled[:, 0].mean() == pytest.approx(7, rel=0.03)
    assert (one.resampled == Bootstrap(sizes, resamples=1234).resampled).all()
    assert (one.resampled != Bootstrap(sizes, resamples=1234, seed=1).resampled).any()


def test_a_paired_difference_is_surer_than_its_sides() -> None:
    """Two modes that fail on the same contexts and differ on one question of each."""
    easy = np.arange(40) % 2
    sums = np.stack([4 * easy + 1, 4 * easy, np.full(40, 5)], 1).astype(float)
    sides, difference = Bootstrap(sums).estimate(
        lambda s: np.stack([s[..., 0], s[..., 0] - s[..., 1]], -1) / s[..., 2:]
    )
    assert sides.half_width is not None and sides.half_width > 0.1
    assert difference.interval == pytest.approx((0.2, 0.2))


def test_no_interval_where_it_would_have_no_end() -> None:
    assert Bootstrap(totals([1], [2])).estimate(share)[0].interval is None
    (found,) = Bootstrap(totals([1, 0, 0], [1, 0, 0])).estimate(share)  # asked in one of three
    assert (found.value, found.interval) == (1, None)
