"""Reports and results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

if TYPE_CHECKING:
    from ragcache.bootstrap import Estimate
    from ragcache.doctor import Finding
    from ragcache.indexing import Progress as Told
    from ragcache.scores import Figures
    from ragcache.simulate import Row
    from ragcache.speeds import Speeds
    from ragcache.store.catalog import Entry
    from ragcache.store.disk import DiskStore
    from ragcache.store.transfer import Moved
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


def document_table(entries: Sequence[Entry]) -> Table:
    """Documents, how many chunks each has, and how long it is kept."""
    table = Table("document", Column("chunks", justify="right"), "kept until", "pinned", box=SIMPLE)
    for entry in entries:
        until = "" if entry.expires is None else f"{datetime.fromtimestamp(entry.expires):%F %T}"
        table.add_row(entry.id, str(entry.chunks), until, "yes" if entry.pinned else "")
    return table


def store_table(store: DiskStore) -> Table:
    """What a store holds, for whom, and what its remote is still to be told."""
    stats, waiting = store.stats(), store.waiting
    table = Table("built for", Column("chunks", justify="right"), box=SIMPLE)
    for name, count in sorted(stats.fingerprints.items()):
        table.add_row(name, f"{count:,}")
    table.title = f"{stats.chunks:,} chunks, {size(stats.payload_bytes)} of KV"
    if waiting:
        table.caption = f"{waiting:,} changes are still to be told to the remote"
    return table


def moved(done: Moved, what: str) -> str:
    """One line: what became of chunks that were to be moved."""
    parts = {
        f"chunks {what}": done.moved,
        "were there": done.there,
        "damaged": done.damaged,
        "had no room": done.no_room,
        "of another kind": done.other,
    }
    return ", ".join(f"{n:,} {part}" for part, n in parts.items() if n or part == f"chunks {what}")


def simulation_table(rows: Sequence[Row], working_set: int) -> Table:
    """What each policy would have served, in percent; ``working_set`` in bytes."""
    table = Table(
        "store",
        "policy",
        *(Column(head, justify="right") for head in ("chunks", "tokens", "FLOPs", "of Belady's")),
        Column("evictions", justify="right"),
        title=f"served of the trace, in percent; asked for twice and more: {size(working_set)}",
        box=SIMPLE,
    )
    for row in rows:
        o = row.outcome
        rates = (f"{100 * rate:.1f}" for rate in (o.hit_rate, o.token_rate, o.saved, row.of_belady))
        evictions = "" if o.policy == "bound" else str(o.evictions)
        table.add_row(size(o.capacity), o.policy, *rates, evictions, end_section=not evictions)
    return table


def finding_table(findings: Sequence[Finding]) -> Table:
    """What was looked at, and what to do about it."""
    colours = {"good": "green", "look": "yellow", "bad": "bold red"}
    table = Table("what", "", "found", box=SIMPLE)
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, state, escape(finding.detail))
    return table


def summary(answer: Answer) -> str:
    """One line: what was reused, what it cost, how long it took."""
    r = answer.report
    return (
        f"{r.mode}: {len(answer.passages)} chunks, {r.chunk_tokens} tokens; "
        f"{r.reused_tokens} reused, {r.chunk_tokens - r.reused_tokens} recomputed, "
        f"charged {r.charged_share:.0%}, {size(r.bytes_loaded)} loaded; "
        f"first token after {1e3 * r.ttft_s:.0f} ms, all after {1e3 * r.total_s:.0f} ms"
    )


def explanation(answer: Answer) -> Iterator[str]:
    """Why that ratio, where it was chosen to suit the machine, and whether it came out so."""
    r, plan = answer.report, answer.report.plan
    if plan is None:
        return
    yield from (f"- {sentence}" for sentence in plan.sentences)
    waited = sum(layer.wait_s for layer in r.layers)
    more = len(answer.tokens) - 1
    decoding = f", then {_ms(plan.token_s)} a token" if more else ""
    yield (
        f"- Predicted: first token after {_ms(plan.prefill_s)} (loading {_ms(plan.load_s)}, "
        f"computing {_ms(plan.compute_s)}){decoding}."
    )
    decoded = f", then {_ms((r.total_s - r.ttft_s) / more)} a token" if more else ""
    yield f"- Measured: first token after {_ms(r.ttft_s)}, {_ms(waited)} of it waiting{decoded}."


def speed_table(speeds: Speeds) -> Table:
    """What was measured, in units for people."""
    rate = f"{1e-9 / speeds.byte_s:.2f} GB/s" if speeds.byte_s else "too fast to tell"
    rows = {
        "any prefill": _ms(speeds.start_s),
        "a computed token": f"{1e6 * speeds.row_s:.1f} µs",
        "in a prompt of 1,000 tokens, also": f"{1e9 * speeds.pair_s:.1f} µs",
        "a loaded token, to place it": f"{1e6 * speeds.place_s:.1f} µs",
        "a layer of a chunk, to read it": f"{1e6 * speeds.read_s:.1f} µs",
        "and its bytes": rate,
        "of reading, computing stands still for": f"{speeds.stolen:.0%}",
        "a token of the answer": _ms(speeds.token_s),
    }
    for codec, seconds in speeds.decode_s.items():
        rows[f"to decode {codec}"] = f"{1e-6 / seconds:,.0f} MB/s" if seconds else "nothing"
    table = Table("what", Column("takes", justify="right"), title=speeds.measured, box=SIMPLE)
    for what, takes in rows.items():
        table.add_row(what, takes)
    return table


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
            chunk.miss or ("stored, but computed" if chunk.cheaper else "stored"),
        )
    return table


def layer_table(report: Report) -> Table:
    """Per layer: rows computed, bytes loaded, where the time went, and when that was."""
    columns = ("layer", "rows", "of chunks", "loaded", "read ms", "wait", "place", "compute")
    table = Table(*columns, f"{READING} read {PLACING} place {COMPUTING} compute", title="layers")
    for column in table.columns[:-1]:
        column.justify = "right"
    for number, (layer, line) in enumerate(zip(report.layers, waterfall(report), strict=True)):
        seconds = (layer.read_s, layer.wait_s, layer.place_s, layer.compute_s)
        table.add_row(
            str(number),
            str(layer.rows),
            str(layer.charged),
            size(layer.load_bytes),
            *(f"{1e3 * s:.1f}" for s in seconds),
            line,
        )
    return table


READING, PLACING, COMPUTING = "░▒█"


def waterfall(report: Report, width: int = 48) -> list[str]:
    """A line per layer, from the beginning of the fusion to its end: what was done with it when.

    Blank behind ``READING`` is a layer that was there and whose turn had not come.
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


def score_tables(figures: Sequence[Figures], title: str) -> Iterator[Table]:
    """What every mode got right; how that differs from one of them, if so asked; what it cost."""
    yield score_table(figures, title)
    yield nearness_table(figures, "how near to full prefill")
    if figures[0].against is not None:
        yield difference_table(figures)
    yield cost_table(figures)


def score_table(figures: Sequence[Figures], title: str) -> Table:
    """Mode x (exact match by kind, F1, Rouge-L), in percent.

    A column that no mode has a figure for is left out.
    """
    first = figures[0]
    columns = [
        *(
            (_head(first, kind), [_percent(f.exact_match[kind]) for f in figures])
            for kind in first.questions
        ),
        ("F1", [_percent(f.f1) for f in figures]),
        ("Rouge-L", [_percent(f.rouge_l) for f in figures]),
    ]
    return _mode_table(figures, columns, title, _resampled(first))


def difference_table(figures: Sequence[Figures]) -> Table:
    """Mode x exact match by kind minus that of the mode ``against``, in points."""
    first = figures[0]
    columns = [
        (_head(first, kind), [_percent(f.difference[kind], "+.1f") for f in figures])
        for kind in first.questions
    ]
    return _mode_table(figures, columns, f"minus {first.against}, in points", _resampled(first))


def cost_table(figures: Sequence[Figures]) -> Table:
    """Mode x (TTFT, how much faster than full, recomputed and charged shares, bytes loaded)."""
    columns = [
        ("TTFT ms", [f"{1e3 * f.ttft_s:.1f}" for f in figures]),
        ("faster\nthan full", [_number(f.speedup, ".2f", "x") for f in figures]),
        ("recomputed", [f"{f.recomputed:.1%}" for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
        ("loaded", [size(f.bytes_loaded) for f in figures]),
    ]
    return _mode_table(figures, columns, "what it cost")


def nearness_table(figures: Sequence[Figures], title: str) -> Table:
    """Mode x (recovery by kind and agreement in percent, KL in nats, charged share)."""
    columns = [
        *(
            (f"{kind}\nrecovered", [_percent(f.recovery[kind]) for f in figures])
            for kind in figures[0].recovery
        ),
        ("first token\nagrees", [_percent(f.agreement) for f in figures]),
        ("KL", [_number(f.kl, ".4f") for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
    ]
    return _mode_table(figures, columns, title)


def curve_table(figures: Sequence[Figures]) -> Table:
    """Mode x (share of full prefill's answers, as a bar and in percent; nearness; cost)."""
    columns = [
        ("full prefill's answers", [_bar(f.same.value if f.same else 0.0) for f in figures]),
        ("%", [_percent(f.same) for f in figures]),
        ("first token\nagrees", [_percent(f.agreement) for f in figures]),
        ("KL", [_number(f.kl, ".4f") for f in figures]),
        ("charged", [f"{f.charged:.1%}" for f in figures]),
        ("faster\nthan full", [_number(f.speedup, ".2f", "x") for f in figures]),
    ]
    return _mode_table(figures, columns, "what is kept of full prefill", _resampled(figures[0]))


def choice(chosen: Figures | None, keep: float) -> str:
    """What to set, in a sentence or two."""
    if chosen is None or chosen.same is None:
        return (
            f"None of these keeps {keep:.0%} of full prefill's answers. Use mode full or prefix, "
            "try another mode, or ask for less with --keep."
        )
    name, _, ratio = chosen.mode.partition("@")
    flags = f"--mode {name}" + (f" --ratio {ratio}" if ratio else "")
    kept = f"{chosen.same.value:.0%} of full prefill's answers"
    low = chosen.same.interval[0] if chosen.same.interval else 0.0
    unsure = f" The 95 % interval goes down to {low:.0%}: ask more questions to be surer."
    return f"Least that keeps {keep:.0%}: {flags} ({kept}, {chosen.charged:.0%} computed)." + (
        unsure if low < keep else ""
    )


def _bar(share: float, width: int = 20) -> str:
    full = round(width * share)
    return "█" * full + "░" * (width - full)


def _mode_table(
    figures: Sequence[Figures],
    columns: Iterable[tuple[str, list[str]]],
    title: str,
    caption: str | None = None,
) -> Table:
    table = Table(title=title, caption=caption, box=SIMPLE)
    table.add_column("mode", overflow="fold", min_width=12)
    filled = [(head, cells) for head, cells in columns if any(cells)]
    for head, _ in filled:
        table.add_column(head, justify="right", no_wrap=True)
    for row, f in enumerate(figures):
        table.add_row(f.mode, *(cells[row] for _, cells in filled))
    return table


def _head(figures: Figures, kind: str) -> str:
    return f"{kind}\n({figures.questions[kind]})"


def _resampled(figures: Figures) -> str:
    return f"± half of the 95 % interval: bootstrap over {figures.contexts} contexts"


def _percent(share: Estimate | float | None, form: str = ".1f") -> str:
    """``93.2 ±2.1``: a share in percent, with half its interval where it has one."""
    if share is None or isinstance(share, (int, float)):
        return _number(None if share is None else 100 * share, form)
    text, half = _number(100 * share.value, form), share.half_width
    return text if half is None else f"{text} ±{100 * half:.1f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
