"""Test which candidates disagree with full prefill in at most a share ε of cases.

Learn then Test (Angelopoulos et al., arXiv:2110.01052). A candidate that disagreed on ``failures``
of ``trials`` independent questions has the p-value P(X <= failures), X ~ Binomial(trials, ε), for
the hypothesis that its risk is above ε. It is exact, as Clopper and Pearson's bound is
(Biometrika 26, 1934): the p-value is at most δ where the bound at confidence 1 - δ is at most ε.

Candidates come in *sequences* whose order is fixed before the questions are asked, such as the
ratios of a mode from the largest down. Each is tested at the whole level of its sequence until the
first that fails (fixed-sequence testing): if a false hypothesis is accepted, then the first one in
the sequence was, which has at most the probability of that level. That holds in any order; since
the risk usually falls with the ratio, this order loses nothing.

Several sequences share δ = 1 - confidence equally (Bonferroni), and some of them are *chains*: one
whose candidates all pass hands its level on to the next (the fallback procedure, Wiens and
Dmitrienko, Journal of Biopharmaceutical Statistics 15, 2005). In a chain, a sequence with a false
hypothesis hands on nothing without accepting it, so the levels at which false hypotheses are tested
first are of disjoint shares, and add up to δ at most. So with the stated confidence **every**
candidate that passes keeps the promise, and any of them may be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import exp, lgamma, log, log1p
from typing import NamedTuple

from ragcache.errors import ConfigError

__all__ = ["Promise"]

_LEAST = 0.0001  # of a share that is promised, or of the chance that the promise is false
_NEGLIGIBLE = 1e-17  # a term of a sum, as a share of the sum
_BISECTIONS = 60
_ROUNDING = 1e-9
_MOST_QUESTIONS = 100_000


@dataclass(frozen=True, slots=True)
class Trial:
    """On how many independent questions a candidate disagreed with full prefill."""

    questions: int
    failures: int

    def __post_init__(self) -> None:
        assert 0 <= self.failures <= self.questions, f"{self.failures} of {self.questions}"


class Passed(NamedTuple):
    """What of a sequence may be promised."""

    share: float  # of all that may go wrong, with which its candidates were tested
    candidates: int  # their number, from its first on


@dataclass(frozen=True, slots=True)
class Promise:
    """Risk at most ``epsilon``, with this ``confidence``; both from
    :data:`_LEAST` to 1 - :data:`_LEAST`, else ConfigError."""

    epsilon: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, example in (("epsilon", 0.05), ("confidence", 0.95)):
            value = getattr(self, name)
            if not _LEAST <= value <= 1 - _LEAST:
                raise ConfigError(
                    f"{name} is {value}: give a share from {_LEAST:g} to {1 - _LEAST:g}, such as "
                    f"{example:g}"
                )

    def delta(self, share: float) -> float:
        """The probability of a false promise that a test may have which has this share of all."""
        return (1 - self.confidence) * share

    def passes(self, trial: Trial, share: float = 1.0) -> bool:
        """Whether the candidate's own test succeeds."""
        tail = binomial_tail(trial.failures, trial.questions, self.epsilon)
        return tail <= self.delta(share)

    def kept(self, chain: Sequence[Sequence[Trial]], share: float = 1.0) -> list[Passed]:
        """Which candidates of a chain of sequences may be promised. ``share``: what each of its
        sequences has of all that may go wrong, before others hand theirs on."""
        found: list[Passed] = []
        handed = 0.0
        for sequence in chain:
            level = share + handed
            passed = takewhile(bool, (self.passes(trial, level) for trial in sequence))
            found.append(Passed(level, sum(passed)))
            handed = level if found[-1].candidates == len(sequence) else 0.0
        return found

    def needed(self, trial: Trial, share: float = 1.0) -> int | None:
        """The number of questions with which the candidate would pass if it disagreed on the same
        share of them; None if that share is ε or more, or so close to it that 100,000 would
        not do."""
        if self.passes(trial, share):
            return trial.questions
        rate = trial.failures / trial.questions if trial.questions else 0.0
        if rate >= self.epsilon:
            return None
        delta = self.delta(share)

        def least(failures: int) -> int:
            return _least_trials(failures, self.epsilon, delta)

        def would(failures: int) -> bool:
            return rate * least(failures) <= failures + _ROUNDING

        # More failures need more questions, but of those a smaller share fails.
        low, high = trial.failures - 1, trial.failures
        while not would(high):
            if least(high) > _MOST_QUESTIONS:
                return None
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if would(middle) else (middle, high)
        return None if least(high) > _MOST_QUESTIONS else least(high)


def binomial_tail(failures: int, trials: int, rate: float) -> float:
    """P(X <= failures) for X ~ Binomial(trials, rate), rate in (0, 1)."""
    if failures >= trials:
        return 1.0
    if failures + 1 > (trials + 1) * rate:  # the other tail is the shorter one
        return 1.0 - _sum_down(trials - failures - 1, trials, 1 - rate)
    return _sum_down(failures, trials, rate)


def upper_bound(failures: int, trials: int, delta: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a rate: it is below the true rate with a
    probability of at most ``delta``."""
    if failures >= trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if binomial_tail(failures, trials, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def _sum_down(failures: int, trials: int, rate: float) -> float:
    """P(X <= failures), from the last term down; ``failures`` at or below the mode of X, so that
    terms fall."""
    combinations = lgamma(trials + 1) - lgamma(failures + 1) - lgamma(trials - failures + 1)
    term = exp(combinations + failures * log(rate) + (trials - failures) * log1p(-rate))
    total, odds = 0.0, (1 - rate) / rate
    for k in range(failures, -1, -1):
        total += term
        if term < _NEGLIGIBLE * total:
            break
        term *= k / (trials - k + 1) * odds
    return total


def _least_trials(failures: int, epsilon: float, delta: float) -> int:
    """The least number of trials of which ``failures`` may fail."""
    low, high = failures, max(1, failures)  # none fail all: the tail is 1
    while binomial_tail(failures, high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_tail(failures, middle, epsilon) > delta:
            low = middle
        else:
            high = middle
    return high
