"""Render the answers of several modes to the same questions, and what each mode gained and lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Column, Table

from ragcache.cli.render import counted, duration, size
from ragcache.eval.side_by_side import FULL

if TYPE_CHECKING:
    from ragcache.eval.side_by_side import Comparison, ModeFigures

_ALIKE = 1.05  # times within this factor count as equal

#: What follows from how a mode works, said of a mode that lost an answer.
_LIMITS = {
    "reuse": "every chunk's KV is used as it was computed alone, so a pronoun in it does not see "
    "the name that it stands for if that is in another chunk, and no chunk sees another",
    "cacheblend": "only the tokens that deviate most from full prefill at the first layers are "
    "recomputed with the other chunks in view",
    "fused": "only the tokens that depend most on the text before their chunk, and those "
    "that the question and the answer look at, are recomputed with the other chunks in view",
}


_OTHER_CHUNKS = "every question retrieves other chunks, in another order."


def comparison_table(compared: Comparison) -> Table:
    """One question in every mode: answer, correctness, TTFT, and what was computed and loaded."""
    table = _table("mode", "answer", "right")
    for mode, answer in compared.answers.items():
        report = answer.report
        table.add_row(
            mode,
            answer.text.strip(),
            "yes" if compared.is_right(mode) else "no",
            duration(report.ttft_s),
            _times(compared.times_sooner(mode)),
            f"{report.charged_share:.0%}",
            size(report.bytes_loaded),
        )
    return table


def figure_table(figures: Sequence[ModeFigures]) -> Table:
    """All modes over all questions."""
    table = _table("mode", "right", "same as full")
    for one in figures:
        table.add_row(
            one.mode,
            f"{one.right} of {one.questions}",
            f"{one.same} of {one.questions}",
            duration(one.ttft_s),
            _times(one.times_sooner),
            f"{one.charged:.0%}",
            size(one.bytes_loaded),
        )
    return table


def gains_and_losses(figures: Sequence[ModeFigures]) -> Iterator[str]:
    """A sentence or two for every mode but full prefill: how much sooner its first token came, how
    many answers stayed the same, and an example of one that did not."""
    whole = next(one for one in figures if one.mode == FULL)
    for one in figures:
        if one.mode == FULL:
            continue
        joint = "and" if one.same == one.questions or _sooner(one) <= 1 else "but"
        yield (
            f"{one.mode} gave its first token {_compared(one, whole)}, {joint} {_kept(one)}: it "
            f"computed {one.charged:.0%} of the chunks' tokens and loaded "
            f"{size(one.bytes_loaded)} for each question.{_reason(one)}"
        )


def _table(*heads: str) -> Table:
    right = [
        Column(head, justify="right", no_wrap=True)
        for head in ("TTFT", "sooner", "computed", "loaded")
    ]
    return Table(*(Column(head, overflow="fold") for head in heads), *right, box=SIMPLE)


def _times(factor: float) -> str:
    return f"{factor:.1f}x" if factor < 10 else f"{factor:.0f}x"


def _sooner(one: ModeFigures) -> float:
    return one.times_sooner if max(one.times_sooner, 1 / one.times_sooner) >= _ALIKE else 1.0


def _compared(one: ModeFigures, whole: ModeFigures) -> str:
    factor = _sooner(one)
    if factor == 1:
        return f"as late as full prefill (after {duration(one.ttft_s)})"
    often = factor if factor > 1 else 1 / factor
    ratio = f"{often:.1f}" if often < 10 else f"{often:.0f}"
    how = "sooner" if factor > 1 else "later"
    return (
        f"{ratio} times {how} than full prefill (after {duration(one.ttft_s)} instead of "
        f"{duration(whole.ttft_s)})"
    )


def _kept(one: ModeFigures) -> str:
    questions = counted(one.questions, "question")
    if not one.same:
        return f"the same answer to none of {questions}"
    only = "" if one.same == one.questions else "only "
    return f"the same answer {only}to {one.same} of {questions}"


def _reason(one: ModeFigures) -> str:
    """Why little was gained, or what was lost, with an example; nothing for other modes."""
    if one.mode == "prefix":
        often = one.leading_chunks > one.chunks / 2
        return (
            " It can load a chunk only where the prompt begins as an earlier one did: on average "
            f"{_number(one.leading_chunks)} of {_number(one.chunks)} chunks, because "
            + ("these questions were asked before over this store." if often else _OTHER_CHUNKS)
        )
    if one.lost is None:
        return ""
    asked, answers = one.lost.question.text, one.lost.answers
    limit = _LIMITS.get(one.mode)
    return (
        f" To “{asked}” it answered “{_short(answers[one.mode].text)}” and full prefill "
        f"“{_short(answers[FULL].text)}”{f': {limit}' if limit else ''}."
    )


def _number(count: float) -> str:
    return f"{count:.0f}" if count == round(count) else f"{count:.1f}"


def _short(text: str, most: int = 80) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"
