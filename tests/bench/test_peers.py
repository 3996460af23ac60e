"""The comparison with other systems: its prompts, its processes, its arithmetic, and its page."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from bench.peers import page as peers_page
from bench.peers.comparison import Measured, Record, rows, same_share, without_end, word_f1
from bench.peers.driver import Process, SystemFailed, measure, started
from bench.peers.prompts import Source, Workload, from_dataset, from_docs, workload
from bench.peers.protocol import Answered, Loaded, Mode, Setup, installed
from bench.peers.setup import STEPS, make
from ragcache.engine.template import PromptTemplate
from ragcache.types import Tokens

FULL, CHUNKS = Mode("full", "full"), Mode("chunks", "full")
LOADED = Loaded([FULL, CHUNKS], {"fake": "1.0"}, 3, 40, "none")

#: A system that answers with the lengths of what it is asked; the mode `broken` is an error.
FAKE = """
from bench.peers.protocol import Answered, Mode, System, serve

class Fake(System):
    modes = [Mode("full", "full"), Mode("chunks", "full")] + BROKEN
    distributions = ("pytest",)
    settings = "none"

    def ask(self, ask):
        print("a library prints")
        if ask.mode == "broken":
            raise ValueError("no such mode")
        return Answered([len(ask.ids), len(ask.chunks), 9, 1], 0.5, len(ask.question))

serve(lambda setup: Fake())
"""


def template() -> PromptTemplate:
    def tokenize(text: str, *, control: bool = False) -> Tokens:
        return tuple(range(len(text.split())))

    return PromptTemplate("two words", "", tokenize)


def source(chunks: int = 12) -> Source:
    texts = [f"chunk {n} of " + "five " * n for n in range(chunks)]
    return Source("texts", texts, [(f"question {n}", (n,)) for n in range(chunks)])


def made(count: int = 2, **options: int) -> Workload:
    return workload(source(), template(), **({"tokens": 60, "pool": 8} | options), count=count)


def python_of(tmp_path: Path, system: str) -> str:
    """An interpreter that runs ``system``, whatever module it is asked for."""
    script = tmp_path / "system.py"
    script.write_text(system)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(python)


def asked(tmp_path: Path, pythons: dict[str, str]) -> tuple[list[Measured], list[str]]:
    given, lines = made(), list[str]()
    setup = Setup("model", "", 1, 4, 100, list(given.prefix), [])
    return measure(pythons, setup, given, {1}, tmp_path / "logs", lines.append), lines


def test_prompts_have_other_chunks_in_another_order() -> None:
    given = made(count=4)
    orders = {one.prompt.chunks for one in given.asked}
    assert len(orders) == len(given.asked) == 4 and len(given.warm) == 1
    for one in given.asked:
        assert len(one.prompt) <= 60 and set(one.prompt.chunks) <= set(given.pool)
        assert one.again.chunks == one.prompt.chunks
    assert made(count=4) == given
    assert workload(source(), template(), count=4, tokens=60, pool=8, seed=1) != given


def test_a_source_with_few_questions() -> None:
    with pytest.raises(ValueError, match="texts has 3 questions, but 2 prompts need 4"):
        workload(source(3), template(), count=2, tokens=60, pool=8)


def test_prompts_from_a_data_set(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    question = '{"question": "Who?", "answers": ["Mira"]}'
    file.write_text(
        f'{{"chunks": ["a", "b"], "questions": [{question}]}}\n'
        f'{{"chunks": ["b", "c"], "questions": [{question}]}}\n'
    )
    found = from_dataset(file)
    assert found.chunks == ["a", "b", "c"]
    assert found.questions == [("Who?", (0, 1)), ("Who?", (1, 2))]


def test_prompts_from_the_documentation() -> None:
    found = from_docs(template(), ["concepts"])
    assert 'the notes say about "' in found.questions[0][0] and found.chunks[0].startswith("# ")


def test_systems_take_turns_and_keep_their_answers(tmp_path: Path) -> None:
    python = python_of(tmp_path, FAKE.replace("BROKEN", "[]"))
    found, lines = asked(tmp_path, {"one": python, "other": python})
    assert [one.system for one in found] == ["one", "other"]
    for one in found:
        assert one.error == "" and one.peak_mib > 0
        assert one.loaded is not None and one.loaded.versions == {"pytest": pytest.__version__}
        # The last token ends the answer, so it is left out.
        assert {len(record.tokens) for record in one.records} == {3}
        assert [r.again_s for r in one.records if r.mode == "full"] == [None, None]
        assert [r.again_s for r in one.records if r.mode == "chunks"] == [0.5, 0.5]
    turns = [line.split(": ")[1].split(",")[0] for line in lines if line.startswith("prompt")]
    assert turns == ["one", "one", "other", "other", "other", "other", "one", "one"]
    assert "a library prints" in (tmp_path / "logs" / "one.log").read_text()


def test_a_system_that_fails_has_the_reason_and_the_others_go_on(tmp_path: Path) -> None:
    good = python_of(tmp_path, FAKE.replace("BROKEN", "[]"))
    folder = tmp_path / "broken"
    folder.mkdir()
    broken = python_of(folder, FAKE.replace("BROKEN", '[Mode("broken", "full")]'))
    gone = str(tmp_path / "gone" / "python")
    found, _ = asked(tmp_path, {"broken": broken, "gone": gone, "good": good})
    assert found[0].error.startswith("ValueError: no such mode (broken/system.py:")
    assert "run `python -m bench.peers.setup`" in found[1].error
    assert len(found[2].records) == 4


def test_a_process_that_ends(tmp_path: Path) -> None:
    python = python_of(tmp_path, "raise SystemExit(3)")
    with started("one", python, 1, tmp_path / "log") as process:
        with pytest.raises(SystemFailed, match="the process ended with status 3"):
            process.send(Setup("", "", 1, 1, 1, [], []))
    assert isinstance(process, Process)


def measured(name: str, full: float, chunks: float, tokens: list[int]) -> Measured:
    records = []
    for prompt in range(3):
        records.append(Record(prompt, "full", [1, 2, 3, 4], full * (prompt + 1), 100, None))
        records.append(Record(prompt, "chunks", tokens, chunks * (prompt + 1), 10, chunks / 2))
    return Measured(name, LOADED, records, 2.0, 300)


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def test_ratios_and_agreement() -> None:
    slow, fast = measured("ragcache", 4.0, 1.0, [1, 2, 9]), measured("vllm", 2.0, 0.5, [7, 2, 3, 4])
    _, ours, full, other = rows([slow, fast], decode)
    assert (ours.ttft_s, ours.own_ratio, ours.best_ratio, ours.again_s) == (2.0, 4.0, 2.0, 0.5)
    assert (ours.first_same, ours.tokens_same) == (1.0, 0.5)
    assert ours.f1 == pytest.approx(2 * 2 / 7)
    assert (full.own_ratio, full.best_ratio, full.tokens_same) == (1.0, 1.0, 1.0)
    assert (other.first_same, other.tokens_same, other.computed) == (0.0, 0.75, 10)


def test_agreement_of_short_and_empty_answers() -> None:
    assert same_share([], []) == word_f1("", "") == 1.0
    assert same_share([], [1]) == word_f1("", "a") == 0.0
    assert same_share([1, 2], [1, 2, 3, 4]) == 0.5
    assert word_f1("Oslo is it", "in oslo") == pytest.approx(2 / 5)
    assert without_end(Answered([5, 2, 6], 0.1), {2}) == [5]
    assert without_end(Answered([5, 6], 0.1), {2}) == [5, 6]


def test_the_page_says_where_others_are_faster_and_what_failed() -> None:
    systems = [
        measured("ragcache", 4.0, 1.0, [1, 2, 9]),
        measured("vllm", 2.0, 0.5, [1, 2, 3, 4]),
        Measured("kvboost", None, [], error="no wheel for this machine"),
    ]
    text = peers_page.page("a machine", "a command", "a text", systems, rows(systems, decode))
    assert "| ragcache, `chunks` | 2,000 | 4.00 | 2.00 | 500 | 10 | 100% | 50% | 0.57 |" in text
    assert "- Full prefill: vLLM for CPUs, `full`, takes 4,000 ms, ragcache 8,000 ms." in text
    assert "vLLM for CPUs, `chunks`, answers sooner than ragcache's `chunks`: 1,000 ms" in text
    assert "**Not measured**: no wheel for this machine" in text
    assert "| kvboost | – | – | – | – | – | – | – |" in text
    assert set(peers_page.TEXTS) >= {one.system for one in systems}


def test_the_command_on_the_page_has_no_places_of_this_machine() -> None:
    given = ["--model", "/models/small", "--python", "vllm=/x/python", "--prompts", "2"]
    shown = peers_page.command_line([*given, "--page=docs/peers.md"])
    assert shown == "python -m bench.peers --model small --prompts 2"
    shown = peers_page.command_line(["--out", "/tmp/x", "--gguf", "/models/a.gguf"])
    assert shown == "python -m bench.peers --gguf a.gguf"


def test_an_environment_that_is_ready_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for system in STEPS:
        (tmp_path / system).mkdir()
        (tmp_path / system / ".ready").touch()
        make(system, tmp_path)
        assert f"{system}: ready in {tmp_path / system}" in capsys.readouterr().out
    assert os.listdir(tmp_path / "kvboost") == [".ready"]


def test_needed_packages_are_counted_once() -> None:
    count, size = installed(["pytest", "pytest", "not-installed-anywhere"])
    assert 1 < count < 10 and size >= 0
