"""Promises: exact tails and bounds, and what they promise is kept."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, comb, log

import numpy as np
import pytest

from ragcache.errors import ConfigError
from ragcache.eval.promise import Promise, Trial, binomial_tail, upper_bound

CALIBRATIONS = 1000


def exact_tail(failures: int, trials: int, rate: float) -> float:
    """The definition, in fractions."""
    p = Fraction(rate)
    terms = (comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(failures + 1))
    return float(sum(terms, Fraction()))


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.3, 0.5, 0.93])
@pytest.mark.parametrize("trials", [1, 7, 120])
def test_the_tail_is_the_sum_of_its_terms(trials: int, rate: float) -> None:
    for failures in {0, trials // 20, trials // 3, trials // 2, trials - 1, trials}:
        want = exact_tail(failures, trials, rate)
        assert binomial_tail(failures, trials, rate) == pytest.approx(want, rel=1e-9, abs=1e-300)


def test_the_bound_is_clopper_and_pearsons() -> None:
    """Known values: 1 - δ^(1/n) without failures, quantiles of Beta(k + 1, n - k) with some."""
    assert upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert upper_bound(3, 100, 0.05) == pytest.approx(0.0757107937)
    assert upper_bound(10, 200, 0.01) == pytest.approx(0.0981819167)
    assert upper_bound(50, 1000, 0.05) == pytest.approx(0.0628634035)
    assert upper_bound(7, 7, 0.05) == 1
    bound = upper_bound(4, 90, 0.02)
    assert binomial_tail(4, 90, bound) == pytest.approx(0.02)


def test_without_failures_the_questions_needed_are_known() -> None:
    for epsilon, confidence in ((0.05, 0.95), (0.01, 0.99), (0.2, 0.5)):
        promise = Promise(epsilon, confidence)
        least = ceil(log(1 - confidence) / log(1 - epsilon))
        assert promise.needed(Trial(0, 0)) == promise.needed(Trial(least - 1, 0)) == least
        assert promise.passes(Trial(least, 0)) and not promise.passes(Trial(least - 1, 0))


@pytest.mark.parametrize(("questions", "failures"), [(40, 1), (60, 2), (100, 3), (100, 4)])
@pytest.mark.parametrize("sequences", [1, 3])
def test_as_many_questions_are_needed_as_would_pass(
    questions: int, failures: int, sequences: int
) -> None:
    promise = Promise(0.05)
    needed = promise.needed(Trial(questions, failures), sequences)
    counts = range(questions, 3000)
    passing = (
        n for n in counts if promise.passes(Trial(n, -(-failures * n // questions)), sequences)
    )
    assert needed == next(passing)


def test_some_can_never_be_promised() -> None:
    promise = Promise(0.05)
    assert promise.needed(Trial(100, 5)) is promise.needed(Trial(100, 80)) is None
    assert promise.needed(Trial(10_000, 499)) is None  # it would take millions
    assert promise.needed(Trial(200, 2)) == 200  # it passes


def test_a_sequence_ends_at_its_first_failure() -> None:
    promise, good, bad = Promise(0.05), Trial(100, 1), Trial(100, 2)
    assert promise.passes(good) and not promise.passes(bad)
    assert promise.kept([good, good, bad, good]) == 2
    assert promise.kept([bad, good]) == promise.kept([]) == 0
    assert promise.kept([good], sequences=2) == 0  # P(X <= 1) = 0.037, above 0.025


@pytest.mark.parametrize(
    "risks",
    [
        ((0.0, 0.02, 0.049, 0.051, 0.06, 0.2),),
        ((0.03, 0.051, 0.01, 0.06, 0.0),),  # not monotone: the guarantee does not need it
        ((0.02, 0.0501), (0.01, 0.051, 0.0), (0.0501,)),
        ((0.0501,) * 8, (0.0501,) * 8),
    ],
)
def test_one_calibration_in_twenty_may_break_its_promise(
    risks: tuple[tuple[float, ...], ...],
) -> None:
    """Simulated on questions with known risks. A calibration breaks its promise if any candidate
    that it lets pass has a risk above ε, whichever is chosen."""
    random, promise, questions = np.random.default_rng(0), Promise(0.05), 200
    broken = sum(
        any(
            max(risk[:kept], default=0) > promise.epsilon
            for risk, kept in zip(risks, passed, strict=True)
        )
        for passed in (
            [promise.kept(_trials(random, risk, questions), len(risks)) for risk in risks]
            for _ in range(CALIBRATIONS)
        )
    )
    slack = 2.6 * (CALIBRATIONS * 0.05 * 0.95) ** 0.5  # 99.5 % of such counts are below
    assert broken <= 0.05 * CALIBRATIONS + slack


def _trials(random: np.random.Generator, risks: Sequence[float], questions: int) -> list[Trial]:
    """Answers of a mode at several ratios. A question is hard to the same degree for all of them,
    as it is for real ones, so they are not independent."""
    hardness = random.random(questions)
    return [Trial(questions, int((hardness < risk).sum())) for risk in risks]


@pytest.mark.parametrize("options", [(0, 0.95), (1, 0.95), (0.05, 1), (float("nan"), 0.95)])
def test_a_promise_is_a_share_with_a_confidence(options: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="give a share between 0 and 1"):
        Promise(*options)
