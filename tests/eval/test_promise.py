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
MARGINS = 6, 4, 2, 1, 0
MOST_BROKEN = CALIBRATIONS * 0.05 + 2.6 * (CALIBRATIONS * 0.05 * 0.95) ** 0.5  # 99.5 % have fewer


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
@pytest.mark.parametrize("share", [1, 1 / 3])
def test_as_many_questions_are_needed_as_would_pass(
    questions: int, failures: int, share: float
) -> None:
    promise = Promise(0.05)
    needed = promise.needed(Trial(questions, failures), share)
    counts = range(questions, 3000)
    passing = (n for n in counts if promise.passes(Trial(n, -(-failures * n // questions)), share))
    assert needed == next(passing)


def test_some_can_never_be_promised() -> None:
    promise = Promise(0.05)
    assert promise.needed(Trial(100, 5)) is promise.needed(Trial(100, 80)) is None
    assert promise.needed(Trial(10_000, 499)) is None  # it would take millions
    assert promise.needed(Trial(200, 2)) == 200  # it passes


def test_a_sequence_ends_at_its_first_failure() -> None:
    promise, good, bad = Promise(0.05), Trial(100, 1), Trial(100, 2)
    assert promise.passes(good) and not promise.passes(bad)
    assert promise.kept([[good, good, bad, good]]) == [(1, 2)]
    assert promise.kept([[bad, good]]) == promise.kept([[bad]]) == [(1, 0)]
    assert promise.kept([[good]], share=1 / 2) == [(1 / 2, 0)]  # P(X <= 1) = 0.037, above 0.025


def test_a_sequence_that_passes_hands_its_share_on() -> None:
    promise, sure, good = Promise(0.05), Trial(100, 0), Trial(100, 1)
    chain = [[sure, sure], [sure, good], [good, sure], [sure]]
    # P(X <= 1) = 0.037 needs three quarters of 0.05; P(X = 0) = 0.006 an eighth.
    assert promise.kept(chain, 1 / 4) == [(1 / 4, 2), (1 / 2, 1), (1 / 4, 0), (1 / 4, 1)]
    assert promise.kept([[sure]] * 2 + [[good]] * 2, 1 / 4)[2:] == [(3 / 4, 1), (1, 1)]


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
            for risk in risks
            for _, kept in promise.kept([_trials(random, risk, questions)], 1 / len(risks))
        )
        for _ in range(CALIBRATIONS)
    )
    assert broken <= MOST_BROKEN


@pytest.mark.parametrize(
    ("disagree", "pull"),
    [
        ((0.02, 0.045, 0.06, 0.12, 0.3), 1),  # margins say nothing
        ((0.051,) * 5, 1),
        ((0.04, 0.2, 0.1, 0.0, 0.3), 3),  # not monotone in the ratio
        ((0.049, 0.0505, 0.0505, 0.3), 8),
    ],
)
def test_so_it_is_with_escalation(disagree: tuple[float, ...], pull: int) -> None:
    """Simulated: a mode's ratios, at which these shares of answers disagree, and whose margins are
    then the lowest of ``pull`` that agreeing answers have. The risk of every candidate is known."""
    random, promise, questions = np.random.default_rng(1), Promise(0.05), 300
    highest, broken, used = 8.0, 0, 0
    risks = [[each * (1 - least / highest) ** pull for least in MARGINS] for each in disagree]
    for _ in range(CALIBRATIONS):
        hardness = random.random(questions)
        unsure = highest * (1 - (1 - random.random(questions)) ** (1 / pull))
        chain = []
        for each in disagree:
            margins = unsure[hardness < each]
            chain.append([Trial(questions, int((margins >= least).sum())) for least in MARGINS])
        kept = [count for _, count in promise.kept(chain, 1 / len(chain))]
        pairs = list(zip(risks, kept, strict=True))
        broken += any(max(risk[:count], default=0) > promise.epsilon for risk, count in pairs)
        used += any(0 < count < len(MARGINS) for count in kept)
    assert broken <= MOST_BROKEN and used


def _trials(random: np.random.Generator, risks: Sequence[float], questions: int) -> list[Trial]:
    """Answers of a mode at several ratios. A question is hard to the same degree for all of them,
    as it is for real ones, so they are not independent."""
    hardness = random.random(questions)
    return [Trial(questions, int((hardness < risk).sum())) for risk in risks]


@pytest.mark.parametrize(
    "options",
    [(0, 0.95), (1, 0.95), (1e-300, 0.95), (0.05, 1), (0.05, 1e-17), (float("nan"), 0.95)],
)
def test_a_promise_is_a_share_with_a_confidence(options: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="give a share from 0.0001 to 0.9999"):
        Promise(*options)
