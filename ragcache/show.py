"""Reports and results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from ragcache.evaluate import Scores
    from ragcache.pipeline import Progress as Told
    from ragcache.types import Answer, Report


@contextmanager
def progress(console: Console) -> Iterator[Told]:
    """A bar per stage, for as long as the ``with`` lasts; hand what it yields to the work."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as bars:
        stages: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if total == 0:
                return
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield told


def summary(answer: Answer) -> str:
    """One line: what was reused, what it cost, how long it took."""
    r = answer.report
    return (
        f"{r.mode}: {len(answer.passages)} chunks, {r.chunk_tokens} tokens; "
        f"{r.reused_tokens} reused, {r.chunk_tokens - r.reused_tokens} recomputed, "
        f"charged {r.charged_share:.0%}, {size(r.bytes_loaded)} loaded; "
        f"first token after {1e3 * r.ttft_s:.0f} ms, all after {1e3 * r.total_s:.0f} ms"
    )


def answer_table(answers: dict[str, Answer]) -> Table:
    """The same question in several modes: answer, TTFT, shares computed, bytes loaded."""
    table = Table("mode", "answer", "TTFT ms", "recomputed", "charged", "loaded", box=SIMPLE)
    for column in table.columns[2:]:
        column.justify = "right"
    for mode, answer in answers.items():
        r = answer.report
        table.add_row(
            mode,
            answer.text.strip(),
            f"{1e3 * r.ttft_s:.1f}",
            f"{r.recomputed_share:.0%}",
            f"{r.charged_share:.0%}",
            size(r.bytes_loaded),
        )
    return table


def chunk_table(answer: Answer) -> Table:
    """Per chunk: where it is from, its score, and what became of its KV."""
    table = Table("chunk", "score", "tokens", "recomputed", "charged", "KV", title="chunks")
    for column in table.columns[1:5]:
        column.justify = "right"
    for passage, chunk in zip(answer.passages, answer.report.chunks, strict=True):
        table.add_row(
            chunk.id,
            f"{passage.score:.3f}",
            str(chunk.tokens),
            str(chunk.recomputed),
            f"{chunk.charged:.0%}",
            "stored" if chunk.miss is None else chunk.miss,
        )
    return table


def layer_table(report: Report) -> Table:
    """Per layer: rows computed, bytes loaded, time waiting for the load and computing."""
    table = Table("layer", "rows", "of chunks", "loaded", "wait ms", "compute ms", title="layers")
    for column in table.columns:
        column.justify = "right"
    for number, layer in enumerate(report.layers):
        table.add_row(
            str(number),
            str(layer.rows),
            str(layer.charged),
            size(layer.load_bytes),
            f"{1e3 * layer.wait_s:.1f}",
            f"{1e3 * layer.compute_s:.1f}",
        )
    return table


def score_table(scores: Sequence[Scores], title: str) -> Table:
    """Mode x (accuracy by kind, TTFT, recomputed and charged shares, bytes loaded)."""
    kinds = list(scores[0].asked)
    asked = scores[0].asked
    table = Table(
        "mode",
        *(f"{kind}\n({asked[kind]})" for kind in kinds),
        "TTFT\nms",
        "faster\nthan full",
        "recom-\nputed",
        "charged",
        "loaded",
        title=title,
        box=SIMPLE,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for s in scores:
        row = s.summary()
        speedup = row["ttft_speedup"]
        table.add_row(
            s.mode,
            *(f"{s.accuracy(kind):.1%}" for kind in kinds),
            f"{row['ttft_ms']:.1f}",
            "" if speedup is None else f"{speedup:.2f}x",
            f"{row['recomputed']:.1%}",
            f"{row['charged_budget']:.1%}",
            size(row["bytes_loaded"]),
        )
    return table


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
