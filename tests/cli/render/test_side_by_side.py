"""The last words of the demo."""

from __future__ import annotations

from dataclasses import replace

from ragcache.cli.render.side_by_side import gains_and_losses
from ragcache.eval.side_by_side import ModeFigures
from tests.eval.test_side_by_side import answered


def figures(**given: object) -> ModeFigures:
    known = ModeFigures("fused", 4, 2.0, 6.0, 0.15, 3 << 20, 4, 4, 12.0, 0.0, None)
    return replace(known, **given)  # type: ignore[arg-type]


WHOLE = figures(mode="full", ttft_s=12.0, times_sooner=1.0, charged=1.0, bytes_loaded=0)


def test_the_last_words_follow_from_the_figures() -> None:
    lost, other = (
        answered("In Bexley.", ("Oslo",), "In Oslo.", mode=mode) for mode in ("reuse", "other")
    )
    kept, wrong, late, none, early = gains_and_losses(
        [
            WHOLE,
            figures(),
            figures(mode="reuse", times_sooner=22.4, ttft_s=0.5, same=1, lost=lost),
            figures(mode="prefix", times_sooner=1.01, ttft_s=11.9, leading_chunks=1.5),
            figures(mode="none", same=0),
            figures(mode="other", times_sooner=0.5, ttft_s=24.0, same=3, lost=other),
        ]
    )
    assert kept == (
        "fused gave its first token 6.0 times sooner than full prefill (after 2.0 s instead of "
        "12 s), and the same answer to 4 of 4 questions: it computed 15% of the chunks' tokens and "
        "loaded 3.0 MiB for each question."
    )
    assert "22 times sooner" in wrong and "but the same answer only to 1 of 4 questions" in wrong
    assert "To “Who?” it answered “In Bexley” and full prefill “In Oslo”: every chunk's" in wrong
    assert "as late as full prefill (after 12 s), and the same answer to 4 of 4" in late
    assert late.endswith(
        "on average 1.5 of 12 chunks, because every question retrieves other chunks, in another "
        "order."
    )
    (again,) = gains_and_losses([WHOLE, figures(mode="prefix", leading_chunks=11.0)])
    assert "11 of 12 chunks, because these questions were asked before" in again
    assert "2.0 times later than full prefill" in early and "and the same answer only" in early
    assert "but the same answer to none of 4 questions: it computed" in none
    assert early.endswith("full prefill “In Oslo”.")
