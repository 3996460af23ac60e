"""Output for people: answers, progress, and terminals of all kinds."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.table import Table

from ragcache.cli.render import (
    ProgressReporter,
    Screen,
    counted,
    duration,
    one_line,
    plain,
    progress,
    stages,
    waiting,
)
from ragcache.cli.render.answers import late, waterfall
from ragcache.cli.render.quality import ModeTable
from ragcache.cli.render.screen import replace_unencodable
from ragcache.cli.render.stores import index_text
from ragcache.retriever.index_description import IndexDescription
from ragcache.types import Answer, LayerTrace, Prompt, Report

PROMPT = Prompt.of((1,), ((2, 3),), (4,))


def trace(read_at: float, read: float, at: float, wait: float, compute: float) -> LayerTrace:
    return LayerTrace(4, 4, 2, 100, read_at, read, at, wait, 0.25, compute)


def report(*layers: LayerTrace) -> Report:
    return Report("fused", {}, 1, 8, 2, 6, 2, 0.15, 100, 0.0, 0.0, layers=layers)


def test_the_waterfall_shows_when_a_layer_was_read_and_computed() -> None:
    layers = trace(0.0, 0.5, 0.0, 0.5, 0.25), trace(0.5, 0.25, 1.0, 0.0, 0.75)
    assert waterfall(report(*layers), width=8) == ["░░▒█    ", "  ░ ▒███"]


def test_an_index_is_told_in_a_line() -> None:
    assert index_text(IndexDescription("flat", 1200, 1.0)) == "index: flat of 1,200 vectors, exact"
    said = index_text(IndexDescription("hnsw", 10**6, 0.984, 0.98, 4, 1e9))
    assert re.fullmatch(
        r"index: hnsw of 1,000,000 vectors, recall@10 98\.4%, measured 2001-09-.*, width 4", said
    )
    said = index_text(IndexDescription("ivfpq", 10**7, 0.91, 0.98, 64, 1e9))
    assert said.endswith("width 64 (below index_recall, 98.0%)")


def test_what_was_computed_late_is_said() -> None:
    def said(**changes: Any) -> list[str]:
        return [*late(Answer("Oslo", (1,), "eos", (), PROMPT, replace(report(), **changes)))]

    assert said() == []
    assert said(late_tokens=1200, late_s=0.0123) == [
        "- 1,200 of the recomputed tokens are those that the question looked at (in 12.3 ms, "
        "before the first token), or the answer while it was decoded."
    ]
    assert "first token" not in said(late_tokens=3)[0]


def test_what_takes_no_time_is_not_drawn_and_little_is() -> None:
    layers = trace(0.0, 0.0, 0.0, 0.0, 0.001), trace(0.0, 0.0, 0.251, 0.0, 7.0)
    first, second = waterfall(report(*layers), width=10)
    assert "░" not in first + second and first.startswith("█") and "█" * 9 in second
    assert waterfall(report()) == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 ms"),
        (2.5e-5, "25.0 µs"),
        (0.0123, "12.3 ms"),
        (1.26, "1.3 s"),
        (12.345, "12 s"),
        (74, "1 min 14 s"),
        (7380, "2 h 3 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_have_the_unit_that_suits_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_counts_agree_with_their_noun() -> None:
    assert [counted(n, "chunk") for n in (0, 1, 2698)] == ["0 chunks", "1 chunk", "2,698 chunks"]


# -- what documents say cannot command a terminal -------------------------------------------------

HOSTILE = "a\x1b[31mred\x07\x9b2J\u202egnp.exe\r"
HARMLESS = "a\\x1b[31mred\\x07\\x9b2J\\u202egnp.exe\\r"


def screen(file: io.TextIOBase, **how: object) -> Screen:
    return Screen(markup=False, file=file, **{"width": 80, **how})  # type: ignore[arg-type]


def test_control_characters_are_spelled_out_wherever_they_stand() -> None:
    printed = io.StringIO()
    out = screen(printed, force_terminal=True, color_system=None)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    out.print(HOSTILE, table, highlight=False)
    assert printed.getvalue().count(HARMLESS) == 5
    assert not set(printed.getvalue()) & set("\x1b\x07\x9b\u202e\r")


def test_answers_keep_their_lines_and_names_have_one() -> None:
    assert plain("one\r\ntwo\tthree\n") == "one\ntwo\tthree\n"
    assert one_line("one\ntwo\t") == "one\\ntwo\\t"
    assert plain("Çà 👩‍👩‍👧 עברית") == "Çà 👩‍👩‍👧 עברית"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_can_show_everything(encoding: str) -> None:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding=encoding)
    replace_unencodable((text, object()))
    screen(text).print("█░ 25 µs ±1, 漢 and \udce9", highlight=False)
    text.flush()
    said = raw.getvalue().decode(encoding)
    assert said.endswith("and \\udce9\n")
    if encoding == "ascii":
        assert said == "#. 25 us +-1, \\u6f22 and \\udce9\n"


# -- work under way -------------------------------------------------------------------------------


def told(
    *steps: tuple[float, int, int], tokens: Sequence[tuple[int, int]] = ()
) -> ProgressReporter:
    """Work that reported chunks (and tokens) at these times; now is the last of them."""
    clock = {"now": 0.0}
    one = ProgressReporter(now=lambda: clock["now"])
    for number, (at, done, total) in enumerate(steps):
        clock["now"] = at
        if tokens:
            one.tokens(*tokens[number])
        one("precompute", done, total)
    return one


def test_tokens_per_second_and_the_time_left_are_known_from_the_first_batch() -> None:
    begun = told((5.0, 0, 40), tokens=[(0, 10_000)])
    assert begun.text("precompute") == "0 of 40"
    one = told((5.0, 0, 40), (15.0, 30, 40), tokens=[(0, 10_000), (2_000, 10_000)])
    assert one.text("precompute") == "30 of 40, 200 tokens/s, 40 s left"
    end = told((5, 0, 40), (15, 40, 40), tokens=[(0, 10_000), (10_000, 10_000)])
    assert end.text("precompute") == "40 of 40, 1,000 tokens/s, 10 s"


def test_without_tokens_the_time_left_follows_from_what_is_done() -> None:
    assert told((0, 10, 40), (10, 20, 40)).text("precompute") == "20 of 40, 20 s left"
    assert told((0, 0, 0)).stage == ""  # nothing to do, nothing to show


def test_lines_also_tell_the_time_so_far() -> None:
    assert told((0, 0, 0)).line() == ""
    resumed = told((0, 10, 40), (10, 20, 40))
    assert resumed.line() == "precompute: 20 of 40, 10 s so far, 20 s left"
    assert told((5, 0, 4), (65, 4, 4)).line() == "precompute: 4 of 4, 1 min 0 s"
    assert [stages._pause_s(s) for s in (0, 200, 86_400)] == [5, 10, 60]


def test_where_there_is_no_terminal_lines_say_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stages, "EVERY_S", 0.02)
    printed = io.StringIO()
    with progress(screen(printed)) as one:
        one("index", 1, 2)
        deadline = time.monotonic() + 30
        while printed.getvalue().count("index: 1 of 2, ") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    with waiting(screen(printed), "loading [the] model"):
        while "loading [the] model: " not in printed.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = printed.getvalue().splitlines()
    assert all(re.fullmatch(r"index: 1 of 2, .* so far", line) for line in lines[:2])
    assert lines[-1].endswith(" so far")


def test_what_is_done_soon_prints_nothing_where_there_is_no_terminal() -> None:
    printed = io.StringIO()
    with progress(screen(printed)) as one, waiting(screen(printed), "loading"):
        one("index", 1, 2)
    assert printed.getvalue() == ""


def test_a_bar_fits_80_columns() -> None:
    printed = io.StringIO()
    with progress(screen(printed, force_terminal=True, color_system=None)) as one:
        one.tokens(1_000, 1_000_000)
        one("precompute", 100, 100_000)
        time.sleep(0.05)
        one.tokens(1_500, 1_000_000)
        one("precompute", 2_000, 100_000)
    last = [line for line in printed.getvalue().splitlines() if "precompute" in line][-1]
    assert "2,000 of 100,000, " in last and " tokens/s, " in last
    assert last.rstrip().endswith("left")


# -- tables ---------------------------------------------------------------------------------------


def test_a_table_of_modes_is_never_wider_than_the_terminal_or_100_columns() -> None:
    heads = [f"kind{n}\n(1,072)" for n in range(4)] + ["F1", "Rouge-L"]
    columns = [(head, ["93.2 ±2.1", "100.0 ±12.5"]) for head in heads]
    for width, shown, whole in ((80, 6, False), (120, 6, False), (120, 4, True)):
        modes = ["fused@0.05", "cacheblend:check_layer=2"]
        table = ModeTable(modes, columns[:shown], "title", "caption")
        printed = io.StringIO()
        screen(printed, width=width).print(table)
        said = printed.getvalue()
        assert max(map(len, said.splitlines())) <= min(width, 100)
        assert "fused@0.05" in said and "…" not in said and said.count("±12.5") == shown
        assert ("93.2 ±2.1" in said) is whole


def test_a_closed_pipe_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    hushed: list[object] = []
    monkeypatch.setattr("ragcache.cli.render.screen.discard_output", hushed.append)
    with pytest.raises(SystemExit, match="141"):
        screen(Closed()).print("nobody reads this")
    assert hushed == [sys.stdout]


def test_files_come_before_the_stages_of_a_portion() -> None:
    clock = iter([0.0, 10.0, 10.0, 20.0, 30.0, 30.0, 30.0, 30.0])
    reporter = stages.ProgressReporter(now=lambda: next(clock))
    reporter("files", 0, 4000)
    reporter("index", 500, 500)
    reporter("files", 500, 4000)
    reporter("index", 100, 400)  # of the next portion: counted anew
    assert reporter.line() == (
        "files: 500 of 4,000, 50 files/s, 30 s so far, 50 s left; index: 100 of 400, 10 s so far"
    )
