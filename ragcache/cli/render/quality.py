"""Render the quality of fusion methods, their agreement with full prefill, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ragcache.cli.render import duration, estimate, number, one_line, percent, size

if TYPE_CHECKING:
    from ragcache.eval.calibrate import CandidateTest
    from ragcache.eval.promise import Promise
    from ragcache.eval.summary import ModeSummary


_WIDTH = 100  # columns: a wider table has its intervals on second lines


def score_tables(figures: Sequence[ModeSummary], title: str) -> Iterator[ModeTable]:
    """Tables of scores, of agreement with full prefill, of differences to a mode (if ``against``
    was given), and of costs."""
    yield _score_table(figures, title)
    yield _agreement_table(figures, "agreement with full prefill")
    if figures[0].against is not None:
        yield _difference_table(figures)
    yield _cost_table(figures)


def _score_table(figures: Sequence[ModeSummary], title: str) -> ModeTable:
    """Exact match by kind of question, F1, Rouge-L and PGR of each mode, in percent.

    A column without any figure is left out.
    """
    first = figures[0]
    columns = [
        *(
            (_head(first, kind), [percent(f.exact_match[kind]) for f in figures])
            for kind in first.questions
        ),
        ("F1", [percent(f.f1) for f in figures]),
        ("Rouge-L", [percent(f.rouge_l) for f in figures]),
        ("PGR", [percent(f.pgr) for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
    ]
    return _mode_table(figures, columns, title, f"{_resampled(first)}\n{_pgr_note(first)}")


def _pgr_note(figures: ModeSummary) -> str:
    """What PGR is relative to, or why there is none."""
    from ragcache.eval.comparison import MIN_PGR_GAP

    if figures.gap is None:
        return "no PGR: it needs the modes full and none"
    gap = f"F1 of full is {percent(figures.gap)} points above that of none"
    if figures.admitted:
        return f"PGR: (mode - none) / (full - none) of F1; {gap}"
    return f"no PGR: {gap}, and it needs {100 * MIN_PGR_GAP:.0f}"


def _difference_table(figures: Sequence[ModeSummary]) -> ModeTable:
    """Exact match by kind, F1 and answer KL of each mode minus those of the mode ``against``, in
    points and nats."""
    first = figures[0]
    columns = [
        *(
            (_head(first, kind), [percent(f.difference[kind], "+.1f") for f in figures])
            for kind in first.questions
        ),
        ("F1", [percent(f.f1_difference, "+.1f") for f in figures]),
        ("answer KL\n(nats)", [estimate(f.answer_kl_difference, "+.4f") for f in figures]),
    ]
    return _mode_table(figures, columns, f"minus {first.against}, in points", _resampled(first))


def _cost_table(figures: Sequence[ModeSummary]) -> ModeTable:
    """TTFT, speedup over full prefill, recomputed and charged shares, and bytes of each mode."""
    columns = [
        ("TTFT", [duration(f.ttft_s) for f in figures]),
        ("faster\nthan full", [number(f.speedup, ".2f", "x") for f in figures]),
        ("recomputed", [f"{f.recomputed:.1%}" for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
        ("loaded", [size(f.bytes_loaded) for f in figures]),
    ]
    return _mode_table(figures, columns, "cost")


def _agreement_table(figures: Sequence[ModeSummary], title: str) -> ModeTable:
    """Recovery by kind and agreement in percent, KL divergence in nats, and charged share."""
    columns = [
        *(
            (f"{kind}\nrecovered", [percent(f.recovery[kind]) for f in figures])
            for kind in figures[0].recovery
        ),
        ("answer\nKL", [estimate(f.answer_kl, ".4f") for f in figures]),
        ("answer\ntop-1", [percent(f.answer_top1) for f in figures]),
        ("first\ntoken KL", [number(f.kl, ".4f") for f in figures]),
        ("first\ntop-1", [percent(f.agreement) for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
    ]
    return _mode_table(figures, columns, title)


def curve_table(figures: Sequence[ModeSummary]) -> ModeTable:
    """Share of answers that equal full prefill's, agreement and cost of each mode.

    At most 80 columns wide; long names of modes are folded.
    """
    columns = [
        ("same\nanswer", [_bar(f.same.value if f.same else 0.0) for f in figures]),
        ("%", [percent(f.same) for f in figures]),
        ("first\ntoken", [percent(f.agreement) for f in figures]),
        ("KL", [number(f.kl, ".4f") for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
        ("faster", [number(f.speedup, ".2f", "x") for f in figures]),
    ]
    return _mode_table(
        figures, columns, "answers that equal full prefill's", _resampled(figures[0])
    )


def ratio_advice(chosen: ModeSummary | None, keep: float) -> str:
    """The options to use, in one or two sentences. ``chosen``: None if no mode keeps the share
    ``keep`` of full prefill's answers."""
    if chosen is None or chosen.same is None:
        return (
            f"None of these keeps {keep:.0%} of full prefill's answers. Use mode full or prefix, "
            "try another mode, or lower --keep."
        )
    name, _, ratio = chosen.mode.partition("@")
    flags = f"--mode {name}" + (f" --ratio {ratio}" if ratio else "")
    kept = f"{chosen.same.value:.0%} of full prefill's answers"
    low = chosen.same.interval[0] if chosen.same.interval else 0.0
    uncertain = f" The 95 % interval begins at {low:.0%}: more questions would narrow it."
    return f"Least that keeps {keep:.0%}: {flags} ({kept}, {chosen.charged:.0%} computed)." + (
        uncertain if low < keep else ""
    )


def promise_table(tests: Sequence[CandidateTest], promise: Promise) -> Table:
    """Each candidate's disagreements, their bound, and whether it is promised, or with how many
    questions it would be."""
    table = Table(title=f"promise: at most {promise.epsilon:.1%} disagree", box=SIMPLE)
    table.add_column("mode", overflow="fold", min_width=12)
    escalates = any(one.least_margin for one in tests)
    heads = ("disagreed", "at most", "charged", "promised")
    for head in ("escalated\nbelow margin", *heads) if escalates else heads:
        table.add_column(head, justify="right")
    for one in tests:
        below = f"{one.escalated:.1%} < {one.least_margin:g}" if one.least_margin else "none"
        table.add_row(
            one_line(one.mode),
            *([below] if escalates else ()),
            f"{one.trial.failures} of {one.trial.questions}",
            f"{one.bound:.1%}",
            f"{one.charged:.1%}",
            "yes"
            if one.is_promised
            else "too many disagree"
            if one.needed is None
            else f"with {one.needed:,}",
        )
    return table


def promise_advice(tests: Sequence[CandidateTest], promise: Promise) -> Iterator[str]:
    """The options that are promised, and how many more questions would allow cheaper ones."""
    from ragcache.eval.calibrate import cheapest_promised

    chosen = cheapest_promised(tests)
    said = (
        f"at most {promise.epsilon:.1%} of answers disagree with full prefill's, with "
        f"{promise.confidence:.0%} confidence"
    )
    if chosen is None:
        yield f"Nothing cheaper than full prefill can be promised: {said}. Use mode full."
    else:
        mode, ratio = chosen.mode.partition("@")[::2]
        flags = f"--mode {mode}" + (f" --ratio {ratio}" if ratio else "")
        escalated = ""
        if chosen.least_margin:
            flags += (
                f", full prefill where the first token's margin is below {chosen.least_margin:g}"
            )
            escalated = f"{chosen.escalated:.0%} escalated, "
        yield f"Promised: {flags} ({said}; {escalated}{chosen.charged:.0%} computed)."
    cheaper = tests if chosen is None else tests[: tests.index(chosen)]
    waiting = [(one.needed, one) for one in cheaper if one.needed is not None]
    if waiting:
        needed, one = min(waiting, key=lambda pair: pair[0])
        more = needed - one.trial.questions
        yield f"With {more:,} more questions of which as few disagree, {one.mode} can be promised."


def _bar(share: float, width: int = 8) -> str:
    full = round(width * share)
    return "█" * full + "░" * (width - full)


@dataclass(frozen=True, slots=True)
class ModeTable:
    """A table with a row for each mode. If it is wider than the terminal or than 100 columns,
    intervals are on second lines."""

    modes: Sequence[str]
    columns: Sequence[tuple[str, list[str]]]
    title: str
    caption: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._build(lambda cell: cell)
        natural = console.measure(wide, options=options.update(max_width=1000)).maximum
        narrow = natural > min(options.max_width, _WIDTH)
        yield self._build(lambda cell: cell.replace(" ±", "\n±")) if narrow else wide

    def _build(self, cell: Callable[[str], str]) -> Table:
        table = Table(title=self.title, caption=self.caption, box=SIMPLE)
        table.add_column("mode", overflow="fold", min_width=12)
        for head, _ in self.columns:
            table.add_column(head, justify="right", no_wrap=True)
        for row, mode in enumerate(self.modes):
            table.add_row(one_line(mode), *(cell(cells[row]) for _, cells in self.columns))
        return table


def _mode_table(
    figures: Sequence[ModeSummary],
    columns: Iterable[tuple[str, list[str]]],
    title: str,
    caption: str | None = None,
) -> ModeTable:
    filled = [(head, cells) for head, cells in columns if any(cells)]
    return ModeTable([f.mode for f in figures], filled, title, caption)


def _head(figures: ModeSummary, kind: str) -> str:
    return f"{kind}\n({figures.questions[kind]})"


def _resampled(figures: ModeSummary) -> str:
    return f"± half of the 95 % interval: bootstrap over {figures.contexts} contexts"
