"""Outcomes of modes on the same questions, and their summary with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np

from ragcache.blend.base import Blender
from ragcache.eval.bootstrap import Array, Bootstrap, Estimate

__all__ = ["ModeSummary"]

#: Recovery is relative to the gap between full prefill and reuse; smaller gaps have no recovery.
MIN_RECOVERY_GAP = 0.05


@dataclass(frozen=True, slots=True)
class QuestionOutcome:
    """One question answered in one mode. Comparisons with full prefill are None without it."""

    context: int  # number of its context; questions of one context are not independent
    kind: str
    exact: bool
    f1: float
    rouge_l: float | None  # None if the data set's answers are short
    kl: float | None  # KL(full || mode) at the first answer token, nats
    agrees: bool | None  # the most likely first token is that of full prefill
    same: bool | None  # the answer is that of full prefill, by exact match
    ttft_s: float
    speedup: float | None  # TTFT of full prefill / TTFT of this mode, on this question
    recomputed: float  # share of chunk tokens, mean over layers that are not computed in full
    charged: float  # share of chunk tokens computed, mean over all layers
    bytes_loaded: int


@dataclass(frozen=True, slots=True)
class ModeOutcomes:
    """Outcomes of one mode, by question; all modes have the same questions in the same order."""

    mode: str
    blender: Blender
    outcomes: list[QuestionOutcome] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModeSummary:
    """Figures of one mode. Shares are in [0, 1]; times are medians, the rest are means."""

    mode: str
    method: str
    parameters: Mapping[str, Any]
    questions: Mapping[str, int]  # by kind
    contexts: int  # the number that intervals resample
    exact_match: Mapping[str, Estimate]  # by kind
    mean_match: Estimate  # mean over kinds
    recovery: Mapping[str, Estimate]  # by kind: (this - reuse) / (full - reuse)
    against: str | None  # the mode that ``difference`` compares with
    difference: Mapping[str, Estimate]  # by kind: exact match minus that mode's
    mean_difference: Estimate | None  # of the means over kinds
    f1: float
    rouge_l: float | None
    kl: float | None
    agreement: float | None
    same: Estimate | None  # share of questions with the same answer as full prefill
    ttft_s: float
    speedup: float | None
    recomputed: float
    charged: float
    bytes_loaded: float

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values; ``intervals`` are [low, high] at 95 %, or null."""
        by_kind = {
            "exact_match": self.exact_match,
            "recovery": self.recovery,
            "difference": self.difference,
        }
        return {
            "mode": self.mode,
            "method": self.method,
            "parameters": dict(self.parameters),
            "questions": dict(self.questions),
            "contexts": self.contexts,
            **{name: {k: e.value for k, e in found.items()} for name, found in by_kind.items()},
            "exact_match_mean": self.mean_match.value,
            "against": self.against,
            "difference_mean": self.mean_difference and self.mean_difference.value,
            "intervals": {
                **{
                    name: {k: e.interval for k, e in found.items()}
                    for name, found in by_kind.items()
                },
                "exact_match_mean": self.mean_match.interval,
                "difference_mean": self.mean_difference and self.mean_difference.interval,
                "same_answer": self.same and self.same.interval,
            },
            "f1": self.f1,
            "rouge_l": self.rouge_l,
            "first_token_kl": self.kl,
            "first_token_agreement": self.agreement,
            "same_answer": self.same and self.same.value,
            "ttft_ms": 1e3 * self.ttft_s,
            "ttft_speedup": self.speedup,
            "recomputed": self.recomputed,
            "charged_budget": self.charged,
            "bytes_loaded": self.bytes_loaded,
        }


def figures(scores: Sequence[ModeOutcomes], against: str | None = None) -> list[ModeSummary]:
    """The summary of every mode, with intervals that resample contexts.

    ``recovery`` needs the modes full and reuse, and a gap of more than :data:`MIN_RECOVERY_GAP`
    between them. ``difference`` compares with the mode ``against``, paired by question.
    """
    table = _Table(scores)
    return [table.figures(row, against) for row in range(len(scores))]


class _Table:
    """Counts of correct answers of all modes, by context and kind of question."""

    def __init__(self, scores: Sequence[ModeOutcomes]) -> None:
        self.scores = scores
        self.questions = Counter(o.kind for o in scores[0].outcomes)
        self.full = _row(scores, lambda b: b.name == "full")
        self.reuse = _row(scores, lambda b: b.name == "reuse" and b.placement == "consecutive")
        self.sums = Bootstrap(self._totals(lambda o: o.exact))
        self.same_counts = Bootstrap(self._totals(lambda o: bool(o.same)))

    def _totals(self, counts: Callable[[QuestionOutcome], bool]) -> Array:
        """(contexts, 1 + modes, kinds): numbers of questions, then of those that ``counts``."""
        outcomes = self.scores[0].outcomes
        contexts = {
            number: row for row, number in enumerate(dict.fromkeys(o.context for o in outcomes))
        }
        kinds = {kind: column for column, kind in enumerate(self.questions)}
        at = [contexts[o.context] for o in outcomes], [kinds[o.kind] for o in outcomes]
        totals = np.zeros((len(contexts), 1 + len(self.scores), len(kinds)))
        np.add.at(totals[:, 0], at, 1)
        for row, one in enumerate(self.scores, 1):
            np.add.at(totals[:, row], at, list(map(counts, one.outcomes)))
        return totals

    def figures(self, row: int, against: str | None) -> ModeSummary:
        one = self.scores[row]
        base = next((n for n, s in enumerate(self.scores) if s.mode == against), None)
        (mean_match,) = self.sums.estimate(lambda s: _share(s, row).mean(-1, keepdims=True))
        difference: dict[str, Estimate] = {}
        mean_difference = None
        if base is not None:

            def gap_to_base(sums: Array) -> Array:
                return _share(sums, row) - _share(sums, base)

            difference = self._by_kind(gap_to_base)
            (mean_difference,) = self.sums.estimate(
                lambda s: gap_to_base(s).mean(-1, keepdims=True)
            )
        return ModeSummary(
            mode=one.mode,
            method=one.blender.mode,
            parameters=one.blender.parameters,
            questions=self.questions,
            contexts=len(self.sums.totals),
            exact_match=self._by_kind(lambda s: _share(s, row)),
            mean_match=mean_match,
            recovery=self._recovery(row),
            against=against,
            difference=difference,
            mean_difference=mean_difference,
            same=self._same(row),
            **_means(one.outcomes),
        )

    def _recovery(self, row: int) -> dict[str, Estimate]:
        """Recovery by kind. Draws in which full is not better than reuse are ignored."""
        full, reuse = self.full, self.reuse
        if full is None or reuse is None:
            return {}

        def gap(sums: Array) -> Array:
            return _share(sums, full) - _share(sums, reuse)

        def recovered(sums: Array) -> Array:
            wide = np.where(gap(sums) > 0, gap(sums), np.nan)
            return (_share(sums, row) - _share(sums, reuse)) / wide

        lost = dict(zip(self.questions, gap(self.sums.totals.sum(0)), strict=True))
        found = self._by_kind(recovered)
        return {kind: one for kind, one in found.items() if lost[kind] > MIN_RECOVERY_GAP}

    def _same(self, row: int) -> Estimate | None:
        if self.full is None:
            return None
        (found,) = self.same_counts.estimate(
            lambda s: (
                s[..., 1 + row, :].sum(-1, keepdims=True) / s[..., 0, :].sum(-1, keepdims=True)
            )
        )
        return found

    def _by_kind(self, statistic: Callable[[Array], Array]) -> dict[str, Estimate]:
        return dict(zip(self.questions, self.sums.estimate(statistic), strict=True))


def _share(sums: Array, row: int) -> Array:
    """Share of correct answers by kind, (..., kinds), of the mode ``row``."""
    return sums[..., 1 + row, :] / sums[..., 0, :]


def _row(scores: Sequence[ModeOutcomes], wanted: Callable[[Blender], bool]) -> int | None:
    return next((row for row, s in enumerate(scores) if wanted(s.blender)), None)


def _means(outcomes: Sequence[QuestionOutcome]) -> dict[str, Any]:
    """The figures that are means or medians over questions."""
    return {
        "f1": mean(o.f1 for o in outcomes),
        "rouge_l": _known(mean, [o.rouge_l for o in outcomes]),
        "kl": _known(mean, [o.kl for o in outcomes]),
        "agreement": _known(mean, [o.agrees for o in outcomes]),
        "ttft_s": median(o.ttft_s for o in outcomes),
        "speedup": _known(median, [o.speedup for o in outcomes]),
        "recomputed": mean(o.recomputed for o in outcomes),
        "charged": mean(o.charged for o in outcomes),
        "bytes_loaded": mean(o.bytes_loaded for o in outcomes),
    }


def _known(average: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """The ``average`` of the values that are not None; None if all are."""
    known = [float(value) for value in values if value is not None]
    return average(known) if known else None
