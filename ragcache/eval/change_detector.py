"""Notice that a share has come to exceed what is allowed, by looking after every observation.

A test at a fixed level that is repeated until it succeeds always succeeds in the end. An
*e-detector* may be looked at as often as one likes (Shin, Ramdas and Rinaldo, 2022,
arXiv:2203.03532). It bets against the allowed share m, as in Waudby-Smith and Ramdas (Estimating
means of bounded random variables by betting, 2024, arXiv:2010.09686): with a stake b in (0, 1), an
event multiplies the wealth by 1 + b (1 - m) / m, and no event by 1 - b. While the share is m or
less, neither bet gains in the mean, whatever came before. The wealth begins again at 1 when it has
fallen below it, so that good times do not hide what changes after them.
"""

from __future__ import annotations

from statistics import fmean

__all__ = ["ChangeDetector"]

#: The stakes of bets that run beside each other: small ones notice small excesses.
_STAKES = 0.02, 0.05, 0.1, 0.25, 0.5, 0.9
#: The least mean number of observations between two false alarms.
RUN_LENGTH = 10_000.0
_LEAST_SHARE = 1e-6  # of events that is allowed: 0 would end all bets at the first


class ChangeDetector:
    """Notices when events come more often than in the share ``allowed`` of the observations.

    As long as they do not, whatever they depend on otherwise, at least ``RUN_LENGTH`` observations
    pass in the mean before an alarm.
    """

    def __init__(self, allowed: float) -> None:
        self._allowed = max(allowed, _LEAST_SHARE)
        self._wealth = [1.0] * len(_STAKES)
        self.observations = self.events = 0

    def add(self, event: bool) -> bool:
        """Count an observation. Returns whether there is an alarm: start again with a new detector
        then."""
        self.observations += 1
        self.events += event
        odds = (1 - self._allowed) / self._allowed
        gains = (1 + stake * odds if event else 1 - stake for stake in _STAKES)
        kept = (max(1.0, wealth) for wealth in self._wealth)
        self._wealth = [wealth * gain for wealth, gain in zip(kept, gains, strict=True)]
        return fmean(self._wealth) >= RUN_LENGTH
