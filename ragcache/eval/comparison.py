"""Compare modes on the same questions: means, differences and gaps, with paired intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ragcache.eval.bootstrap import Array, Bootstrap, Estimate
from ragcache.eval.outcomes import ModeOutcomes, QuestionOutcome

__all__ = ["MIN_PGR_GAP"]

#: Recovery is relative to the gap between full prefill and reuse; smaller gaps have no recovery.
MIN_RECOVERY_GAP = 0.05

#: PGR divides by the gap between full prefill and no context. Over 100 questions, a difference of
#: F1 has a standard error of about 0.05. Below 0.25, the error of the denominator alone would be
#: more than a fifth of it, and the model answers too few of the questions from their chunks.
MIN_PGR_GAP = 0.25

_Statistic = Callable[[Array], Array]  # sums (..., 1 + modes, kinds) to values (..., n)


class Comparison:
    """Scores of all modes, summed by context and kind of question."""

    def __init__(self, scores: Sequence[ModeOutcomes]) -> None:
        self.scores = scores
        self.questions = Counter(o.kind for o in scores[0].outcomes)
        self._full = self._row("full")
        self._none = self._row("none")
        self._reuse = self._row("reuse", positions="consecutive")
        self._matches = self._sums(lambda o: o.exact)
        self._f1 = self._sums(lambda o: o.f1)
        self._answer_kl = self._sums(lambda o: o.answer_kl)
        self._answer_top1 = self._sums(lambda o: o.answer_top1)
        self._same = self._sums(lambda o: o.same)
        self.contexts = len(self._matches.totals)
        self.gap = self._gap(self._f1, _mean)
        self.admitted = None if self.gap is None else self.gap.value >= MIN_PGR_GAP
        self._matches_gap = self._gap(self._matches, _mean_over_kinds)

    def exact_match(self, row: int, base: int | None = None) -> dict[str, Estimate]:
        """Exact match by kind of question; minus that of the mode ``base``, if given."""
        found = self._matches.estimate(_minus(_by_kind, row, base))
        return dict(zip(self.questions, found, strict=True))

    def mean_match(self, row: int, base: int | None = None) -> Estimate:
        """Mean over kinds of the same."""
        return self._matches.estimate(_minus(_mean_over_kinds, row, base))[0]

    def f1(self, row: int, base: int | None = None) -> Estimate:
        return self._f1.estimate(_minus(_mean, row, base))[0]

    def answer_kl(self, row: int, base: int | None = None) -> Estimate | None:
        return self._with_full(self._answer_kl, row, base)

    def answer_top1(self, row: int) -> Estimate | None:
        return self._with_full(self._answer_top1, row)

    def same(self, row: int) -> Estimate | None:
        return self._with_full(self._same, row)

    def recovery(self, row: int) -> dict[str, Estimate]:
        """By kind: the share of the gap in exact match between reuse and full prefill."""
        if self._full is None or self._reuse is None:
            return {}
        recovered, gap = _recovered(_by_kind, row, self._full, self._reuse)
        lost = dict(zip(self.questions, gap(self._matches.totals.sum(0)), strict=True))
        found = dict(zip(self.questions, self._matches.estimate(recovered), strict=True))
        return {kind: one for kind, one in found.items() if lost[kind] > MIN_RECOVERY_GAP}

    def pgr(self, row: int) -> Estimate | None:
        """Performance gap recovered, of F1: (this - none) / (full - none); None without a gap of
        :data:`MIN_PGR_GAP`."""
        return self._pgr(self._f1, _mean, self.gap, row)

    def pgr_exact_match(self, row: int) -> Estimate | None:
        """The same of :meth:`mean_match`."""
        return self._pgr(self._matches, _mean_over_kinds, self._matches_gap, row)

    def _row(self, method: str, **parameters: str) -> int | None:
        for row, one in enumerate(self.scores):
            if one.method == method and parameters.items() <= one.parameters.items():
                return row
        return None

    def _sums(self, score: Callable[[QuestionOutcome], float | None]) -> Bootstrap:
        """Totals (contexts, 1 + modes, kinds): numbers of questions, then sums of ``score``."""
        outcomes = self.scores[0].outcomes
        contexts = {
            number: row for row, number in enumerate(dict.fromkeys(o.context for o in outcomes))
        }
        kinds = {kind: column for column, kind in enumerate(self.questions)}
        at = [contexts[o.context] for o in outcomes], [kinds[o.kind] for o in outcomes]
        totals = np.zeros((len(contexts), 1 + len(self.scores), len(kinds)))
        np.add.at(totals[:, 0], at, 1)
        for row, one in enumerate(self.scores, 1):
            np.add.at(totals[:, row], at, [score(o) or 0.0 for o in one.outcomes])
        return Bootstrap(totals)

    def _with_full(self, sums: Bootstrap, row: int, base: int | None = None) -> Estimate | None:
        """The mean of a score that compares with full prefill; None without that."""
        return None if self._full is None else sums.estimate(_minus(_mean, row, base))[0]

    def _gap(self, sums: Bootstrap, mean: _Mean) -> Estimate | None:
        if self._full is None or self._none is None:
            return None
        return sums.estimate(_minus(mean, self._full, self._none))[0]

    def _pgr(self, sums: Bootstrap, mean: _Mean, gap: Estimate | None, row: int) -> Estimate | None:
        if gap is None or gap.value < MIN_PGR_GAP:
            return None
        assert self._full is not None and self._none is not None, "there is a gap"
        return sums.estimate(_recovered(mean, row, self._full, self._none)[0])[0]


_Mean = Callable[[Array, int], Array]  # sums and the row of a mode to means (..., n)


def _by_kind(sums: Array, row: int) -> Array:
    """Means by kind of question, (..., kinds)."""
    means: Array = sums[..., 1 + row, :] / sums[..., 0, :]
    return means


def _mean_over_kinds(sums: Array, row: int) -> Array:
    """The mean of :func:`_by_kind`, (..., 1)."""
    mean: Array = _by_kind(sums, row).mean(-1, keepdims=True)
    return mean


def _mean(sums: Array, row: int) -> Array:
    """The mean over questions, (..., 1)."""
    mean: Array = sums[..., 1 + row, :].sum(-1, keepdims=True) / sums[..., 0, :].sum(
        -1, keepdims=True
    )
    return mean


def _minus(mean: _Mean, row: int, base: int | None) -> _Statistic:
    """The mean of the mode ``row``, minus that of ``base`` if it is given."""
    if base is None:
        return lambda sums: mean(sums, row)
    return lambda sums: mean(sums, row) - mean(sums, base)


def _recovered(mean: _Mean, row: int, full: int, low: int) -> tuple[_Statistic, _Statistic]:
    """(row - low) / (full - low), and its denominator. Draws in which ``full`` is not better than
    ``low`` have none."""
    gap = _minus(mean, full, low)

    def recovered(sums: Array) -> Array:
        wide = np.where(gap(sums) > 0, gap(sums), np.nan)
        return _minus(mean, row, low)(sums) / wide

    return recovered, gap
