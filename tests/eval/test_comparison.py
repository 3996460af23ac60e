"""Gaps, PGR and differences between modes, and when there are none."""

from __future__ import annotations

import pytest

from ragcache.eval.comparison import MIN_PGR_GAP
from ragcache.eval.outcomes import ModeOutcomes, QuestionOutcome
from ragcache.eval.summary import ModeSummary, figures


def outcome(context: int, f1: float, kl: float | None = None, kind: str = "hop") -> QuestionOutcome:
    return QuestionOutcome(
        context=context,
        kind=kind,
        exact=f1 == 1,
        f1=f1,
        rouge_l=None,
        kl=kl,
        agrees=None if kl is None else kl == 0,
        answer_kl=kl,
        answer_top1=None if kl is None else 1 - kl,
        same=None if kl is None else kl == 0,
        ttft_s=1.0,
        speedup=None,
        recomputed=0.0,
        charged=0.0,
        bytes_loaded=0,
    )


def summaries(against: str | None = None, **f1s: list[float]) -> dict[str, ModeSummary]:
    """Modes by label, with the F1 of every question, each over a context of its own."""
    given = [
        ModeOutcomes(mode, mode, {}, [outcome(n, f1, 0.25) for n, f1 in enumerate(values)])
        for mode, values in f1s.items()
    ]
    return {one.mode: one for one in figures(given, against)}


def test_pgr_is_the_share_of_the_gap_between_none_and_full() -> None:
    found = summaries(none=[0, 0, 0.5, 0.5], full=[1, 1, 1, 0.5], fused=[1, 0, 1, 0.5])
    fused = found["fused"]
    assert fused.gap is not None and fused.gap.value == pytest.approx(0.625)
    assert fused.admitted
    assert fused.pgr is not None and fused.pgr.value == pytest.approx((0.625 - 0.25) / 0.625)
    assert [found[mode].pgr.value for mode in ("none", "full")] == [0, 1]  # type: ignore[union-attr]
    exact = fused.pgr_exact_match
    assert exact is not None and exact.value == pytest.approx((0.5 - 0) / (0.75 - 0))


def test_its_interval_resamples_questions_of_all_modes_together() -> None:
    """Full and fused have the same answers: every draw gives exactly 1, however wide F1's own
    interval is."""
    full = [1.0, 0.5] * 20
    found = summaries(none=[0.0] * 40, full=full, fused=full, reuse=[0.5, 0.0] * 20)
    fused, reuse = found["fused"], found["reuse"]
    assert fused.pgr is not None and fused.pgr.interval == (1, 1)
    assert fused.f1.half_width is not None and fused.f1.half_width > 0.05
    assert reuse.pgr is not None and reuse.pgr.interval is not None
    low, high = reuse.pgr.interval
    assert reuse.pgr.value == pytest.approx(1 / 3) and low < 1 / 3 < high


@pytest.mark.parametrize(("full", "admitted"), [(0.25, True), (0.24, False)])
def test_a_small_gap_admits_no_pgr(full: float, admitted: bool) -> None:
    assert MIN_PGR_GAP == 0.25
    fused = summaries(none=[0.0, 0.0], full=[full, full], fused=[full, 0.0])["fused"]
    assert fused.gap is not None and fused.admitted is admitted
    assert (fused.pgr is not None) is admitted
    assert fused.pgr_exact_match is None  # no answer is exact


def test_without_the_modes_there_is_neither_gap_nor_agreement() -> None:
    reuse = summaries(reuse=[0.5, 1.0], none=[0, 0])["reuse"]
    assert (reuse.gap, reuse.admitted, reuse.pgr, reuse.answer_kl) == (None,) * 4
    shown = reuse.as_json()
    assert shown["pgr"] is shown["intervals"]["pgr"] is shown["answer_top1"] is None


def test_agreement_and_differences_are_means_over_questions() -> None:
    made = {
        "full": [outcome(n, 1.0, 0.0) for n in range(4)],
        "reuse": [
            outcome(n, f1, kl) for n, (f1, kl) in enumerate([(1, 0), (0, 1), (0, 1), (0, 1)])
        ],
        "fused": [outcome(n, 1.0, kl) for n, kl in enumerate([0, 0, 0, 0.5])],
    }
    given = [ModeOutcomes(mode, mode, {}, outcomes) for mode, outcomes in made.items()]
    full, reuse, fused = figures(given, "reuse")
    assert full.answer_kl is not None and full.answer_kl.interval == (0, 0)
    assert fused.answer_kl is not None and fused.answer_kl.value == 0.125
    assert fused.answer_top1 is not None and fused.answer_top1.value == 0.875
    assert fused.f1_difference is not None and fused.f1_difference.value == 0.75
    assert fused.answer_kl_difference is not None
    assert fused.answer_kl_difference.value == pytest.approx(-0.625)
    assert reuse.f1_difference is not None and reuse.f1_difference.interval == (0, 0)
    assert fused.as_json()["f1_difference"] == 0.75
