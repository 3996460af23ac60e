"""Summarise the outcomes of modes on the same questions, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from ragcache.eval.bootstrap import Estimate
from ragcache.eval.comparison import Comparison
from ragcache.eval.outcomes import ModeOutcomes, QuestionOutcome

__all__ = ["ModeSummary", "figures"]


@dataclass(frozen=True, slots=True)
class ModeSummary:
    """Figures of one mode. Shares are in [0, 1]; times are medians, the rest are means.

    What compares with another mode is None or empty without that mode.
    """

    mode: str
    method: str
    parameters: Mapping[str, Any]
    questions: Mapping[str, int]  # by kind
    contexts: int  # the number that intervals resample
    exact_match: Mapping[str, Estimate]  # by kind
    mean_match: Estimate  # mean over kinds
    f1: Estimate
    rouge_l: float | None
    recovery: Mapping[str, Estimate]  # by kind: (this - reuse) / (full - reuse)
    gap: Estimate | None  # F1 of full minus that of none
    admitted: bool | None  # whether the gap is wide enough for PGR
    pgr: Estimate | None  # performance gap recovered, F1: (this - none) / (full - none)
    pgr_exact_match: Estimate | None  # the same of ``mean_match``
    against: str | None  # the mode that the differences compare with
    difference: Mapping[str, Estimate]  # by kind: exact match minus that mode's
    mean_difference: Estimate | None  # of the means over kinds
    f1_difference: Estimate | None
    answer_kl_difference: Estimate | None
    kl: float | None  # at the first token of the answer
    agreement: float | None  # of the most likely first token
    answer_kl: Estimate | None  # mean over the tokens of full prefill's answer
    answer_top1: Estimate | None  # share of those tokens that are this mode's most likely ones
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
        estimates = {
            "exact_match_mean": self.mean_match,
            "f1": self.f1,
            "gap": self.gap,
            "pgr": self.pgr,
            "pgr_exact_match": self.pgr_exact_match,
            "difference_mean": self.mean_difference,
            "f1_difference": self.f1_difference,
            "answer_kl_difference": self.answer_kl_difference,
            "answer_kl": self.answer_kl,
            "answer_top1": self.answer_top1,
            "same_answer": self.same,
        }
        return {
            "mode": self.mode,
            "method": self.method,
            "parameters": dict(self.parameters),
            "questions": dict(self.questions),
            "contexts": self.contexts,
            **{name: {k: e.value for k, e in found.items()} for name, found in by_kind.items()},
            **{name: found and found.value for name, found in estimates.items()},
            "intervals": {
                **{
                    name: {k: e.interval for k, e in found.items()}
                    for name, found in by_kind.items()
                },
                **{name: found and found.interval for name, found in estimates.items()},
            },
            "admitted": self.admitted,
            "against": self.against,
            "rouge_l": self.rouge_l,
            "first_token_kl": self.kl,
            "first_token_agreement": self.agreement,
            "ttft_ms": 1e3 * self.ttft_s,
            "ttft_speedup": self.speedup,
            "recomputed": self.recomputed,
            "charged_budget": self.charged,
            "bytes_loaded": self.bytes_loaded,
        }


def figures(scores: Sequence[ModeOutcomes], against: str | None = None) -> list[ModeSummary]:
    """The summary of every mode, with intervals that resample contexts.

    ``recovery`` needs the modes full and reuse, and PGR needs full and none; both need a gap
    between these (:mod:`ragcache.eval.comparison`). Differences are to the mode ``against``, paired
    by question.
    """
    compared = Comparison(scores)
    base = next((row for row, one in enumerate(scores) if one.mode == against), None)
    return [
        ModeSummary(
            mode=one.mode,
            method=one.method,
            parameters=one.parameters,
            questions=compared.questions,
            contexts=compared.contexts,
            exact_match=compared.exact_match(row),
            mean_match=compared.mean_match(row),
            f1=compared.f1(row),
            recovery=compared.recovery(row),
            gap=compared.gap,
            admitted=compared.admitted,
            pgr=compared.pgr(row),
            pgr_exact_match=compared.pgr_exact_match(row),
            against=against,
            difference={} if base is None else compared.exact_match(row, base),
            mean_difference=None if base is None else compared.mean_match(row, base),
            f1_difference=None if base is None else compared.f1(row, base),
            answer_kl_difference=None if base is None else compared.answer_kl(row, base),
            answer_kl=compared.answer_kl(row),
            answer_top1=compared.answer_top1(row),
            same=compared.same(row),
            **_means(one.outcomes),
        )
        for row, one in enumerate(scores)
    ]


def _means(outcomes: Sequence[QuestionOutcome]) -> dict[str, Any]:
    """The figures that are means or medians over questions, without intervals."""
    return {
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
