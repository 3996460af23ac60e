"""Render answers and their reports as text and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Column, Table

from ragcache.cli.render import duration, one_line, size

if TYPE_CHECKING:
    from ragcache.types import Answer, Certificate, Report

READING, PLACING, COMPUTING = "░▒█"
_FAR = 3  # factor between predicted and measured time from which the speeds are out of date


def summary(answer: Answer) -> str:
    """One line with the numbers of reused and recomputed tokens, bytes and times."""
    r = answer.report
    return (
        f"{r.mode}: {len(answer.passages)} chunks, {r.chunk_tokens} tokens; "
        f"{r.reused_tokens} reused, {r.chunk_tokens - r.reused_tokens} recomputed, "
        f"charged {r.charged_share:.0%}, {size(r.bytes_loaded)} loaded; "
        f"first token after {duration(r.ttft_s)}, last after {duration(r.total_s)}"
    )


def explanation(answer: Answer) -> Iterator[str]:
    """Lines that say how the ratio was chosen, and the predicted and measured times; no lines if
    it was not chosen by measured speeds."""
    r, plan = answer.report, answer.report.plan
    if plan is None:
        return
    yield from (f"- {sentence}" for sentence in plan.sentences)
    waited = sum(layer.wait_s for layer in r.layers)
    more = len(answer.tokens) - 1
    decoding = f", then {duration(plan.token_s)} a token" if more else ""
    yield (
        f"- Predicted: first token after {duration(plan.prefill_s)} "
        f"(loading {duration(plan.load_s)}, computing {duration(plan.compute_s)}){decoding}."
    )
    decoded = f", then {duration((r.total_s - r.ttft_s) / more)} a token" if more else ""
    yield (
        f"- Measured: first token after {duration(r.ttft_s)}, {duration(waited)} of it "
        f"waiting{decoded}."
    )
    if not r.escalated and max(r.ttft_s, plan.prefill_s) > _FAR * min(r.ttft_s, plan.prefill_s):
        yield "- These differ widely: `ragcache profile` measures again how fast this machine is."


def late(answer: Answer) -> Iterator[str]:
    """A line about the tokens that were computed late, if any."""
    r = answer.report
    if r.late_tokens:
        first = f" (in {duration(r.late_s)}, before the first token)" if r.late_s else ""
        yield (
            f"- {r.late_tokens:,} of the recomputed tokens are those that the question looked at"
            f"{first}, or the answer while it was decoded."
        )


def promise(answer: Answer) -> Iterator[str]:
    """A line about the store's promise, and whether it is made for this answer; none without a
    calibration."""
    found = answer.report.certificate
    if found is None:
        return
    what = "answers" if found.disagreement == "answer" else "first 16 tokens"
    ratio = "" if found.ratio is None else f" at a ratio of {found.ratio:g} or more"
    covered = "covered" if found.covered else f"not covered: {found.reason}"
    if found.margin is not None:
        covered += f": {_escalation(found, found.margin)}"
    yield (
        f"- Promised with {found.confidence:.0%} confidence: in mode {found.mode}{ratio}, at most "
        f"{found.epsilon:.1%} of {what} disagree with full prefill's (calibrated on "
        f"{found.questions:,} questions, {found.date}). This answer is {covered}."
    )


def _escalation(certificate: Certificate, margin: float) -> str:
    """Whether an answer whose first token had this margin was escalated, and what that cost."""
    said = f"the margin of its first token is {margin:.3g}"
    if not certificate.escalated:
        return f"{said}, and answers below {certificate.least_margin:g} are escalated"
    return (
        f"{said}, below {certificate.least_margin:g}, so it was escalated to full prefill after "
        f"{duration(certificate.discarded_s)}"
    )


def reasons(answer: Answer) -> Iterator[str]:
    """Lines that say for every part of the prompt that was not loaded why."""
    for part in answer.report.parts:
        if part.reason:
            what = "chunk" if part.kind == "chunk" else "text"
            yield f"- {what} {one_line(part.name)}, {part.tokens} tokens: {one_line(part.reason)}"


def answer_table(answers: dict[str, Answer]) -> Table:
    """Answers to one question in several modes: text, TTFT, shares of computed tokens, bytes."""
    table = Table("mode", "answer", "TTFT", "recomputed", "charged", "loaded", box=SIMPLE)
    for column in table.columns[2:]:
        column.justify = "right"
    for mode, answer in answers.items():
        r = answer.report
        table.add_row(
            mode,
            answer.text.strip(),
            duration(r.ttft_s),
            f"{r.recomputed_share:.0%}",
            f"{r.charged_share:.0%}",
            size(r.bytes_loaded),
        )
    return table


def chunk_table(answer: Answer) -> Table:
    """Per chunk: id, retrieval score, tokens, shares computed, and whether its KV was stored."""
    table = Table(Column("chunk", overflow="fold"), title="chunks", box=SIMPLE)
    for head in ("score", "tokens", "recomputed", "charged"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("KV")
    for passage, chunk in zip(answer.passages, answer.report.chunks, strict=True):
        table.add_row(
            one_line(chunk.id),
            f"{passage.score:.3f}",
            str(chunk.tokens),
            str(chunk.recomputed),
            f"{chunk.charged:.0%}",
            chunk.miss or ("stored, but computed" if chunk.cheaper else "stored"),
        )
    return table


def layer_table(report: Report, columns: int = 120) -> Table:
    """Per layer: rows computed, bytes loaded, times, and a timeline, for a terminal that is
    ``columns`` wide."""
    times = [(one.read_s, one.wait_s, one.place_s, one.compute_s) for one in report.layers]
    unit, scale = ("s", 1.0) if max(map(max, times), default=0.0) >= 1 else ("ms", 1e3)
    heads = ("layer", "rows", "of chunks", "loaded", f"read {unit}", "wait", "place", "compute")
    drawn = f"{READING} read\n{PLACING} place\n{COMPUTING} compute"
    table = Table(*heads, drawn, title="layers", padding=(0, 1 if columns >= 100 else 0))
    width = max(9, min(48, columns - 66))
    for column in table.columns[:-1]:
        column.justify = "right"
    for number, (layer, seconds, line) in enumerate(
        zip(report.layers, times, waterfall(report, width), strict=True)
    ):
        table.add_row(
            str(number),
            str(layer.rows),
            str(layer.charged),
            size(layer.load_bytes),
            *(f"{scale * s:.1f}" for s in seconds),
            line,
        )
    return table


def waterfall(report: Report, width: int = 48) -> list[str]:
    """A timeline for each layer, from the beginning of the prefill to its end.

    A gap after ``READING`` means that the layer was loaded before the forward came to it.
    """
    if not report.layers:
        return []
    last = report.layers[-1]
    end = last.at_s + last.wait_s + last.place_s + last.compute_s
    lines = []
    for layer in report.layers:
        placing = layer.at_s + layer.wait_s
        computing = placing + layer.place_s
        spans = (
            (READING, layer.read_at_s, layer.read_at_s + layer.read_s),
            (PLACING, placing, computing),
            (COMPUTING, computing, computing + layer.compute_s),
        )
        line = [" "] * width
        for mark, start, stop in spans:
            if stop > start:
                first = min(int(start / end * width), width - 1)
                past = max(first + 1, min(round(stop / end * width), width))
                line[first:past] = mark * (past - first)
        lines.append("".join(line))
    return lines
