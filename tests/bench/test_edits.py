"""Contexts of an agent, their edits, and how answers are compared."""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

import pytest
import torch

from bench import edits
from bench.agent_context import (
    EDITS,
    QUESTION,
    SYSTEM,
    Context,
    Repository,
    edited,
    messages,
)
from bench.edits import Agreement, Fused, Step, _Reply, agreement, contexts, identical, summary
from ragcache.types import Report

MOST = 12_000  # characters


def count(context: Context) -> int:
    return sum(len(block.text) + len(block.said) for block in context)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A small repository of Python files with tests."""
    root = tmp_path_factory.mktemp("repository")

    def git(*command: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        subprocess.run(("git", "-C", str(root), *who, *command), check=True, capture_output=True)

    git("init", "-q")
    for number in range(20):
        lines = [
            f'def function_{number}_{n}(value: int) -> int:\n    """The sum of value and {n}."""\n'
            f"    return value + {n}\n\n"
            for n in range(20)
        ]
        folder = root / ("tests" if number % 4 == 0 else "code")
        folder.mkdir(exist_ok=True)
        name = f"test_{number}.py" if number % 4 == 0 else f"module_{number}.py"
        text = "".join(lines).replace("def function", "def test" if number % 4 == 0 else "def f")
        (folder / name).write_text(text, encoding="utf-8")
        git("add", ".")
        git("commit", "-qm", f"Add {name}")
    return Repository.at(root)


def test_edits_are_the_same_for_a_seed(repository: Repository) -> None:
    first = list(contexts(repository, 1, 30, count, MOST))
    again = list(contexts(repository, 1, 30, count, MOST))
    assert first == again
    assert first != list(contexts(repository, 2, 30, count, MOST))


def test_every_kind_of_edit_changes_one_thing(repository: Repository) -> None:
    steps = list(contexts(repository, 3, 60, count, MOST))
    assert {kind for _, kind, _ in steps[1:]} == set(EDITS)
    for (before, _, _), (after, kind, _) in zip(steps, steps[1:], strict=False):
        assert 0.88 * MOST <= count(after) <= MOST
        gone, new = set(before) - set(after), set(after) - set(before)
        expected = {
            "drop": (1, 0),
            "change line": (1, 1),
            "insert line": (1, 1),
            "insert file": (0, 1),
            "move": (0, 0),
            "append turn": (0, 1),
        }
        assert (len(gone), len(new)) == expected[kind]
        if kind in ("change line", "insert line"):
            (old,), (changed,) = gone, new
            grown = changed.text.count("\n") - old.text.count("\n")
            assert grown == (kind == "insert line") and changed.name == old.name


def test_texts_are_real(repository: Repository) -> None:
    context, *_ = next(iter(contexts(repository, 0, 0, count, MOST)))
    for block in context:
        if block.text.startswith("<file"):
            path, _, first = block.name.rpartition(":")
            head, *lines, tail = block.text.splitlines()
            assert head == f'<file path="{block.name}">' and tail == "</file>"
            assert "\n".join(lines) in repository.read(path) and int(first) >= 1
        else:
            assert block.role == "tool" and block.text.startswith("$ ")
    chat = messages(context)
    assert chat[0] == {"role": "system", "content": SYSTEM}
    assert chat[-1] == {"role": "user", "content": QUESTION}
    shown = "".join(message["content"] for message in chat)
    assert all(block.text in shown for block in context)


def test_a_range_without_room_is_said(repository: Repository) -> None:
    context, *_ = next(iter(contexts(repository, 0, 0, count, MOST)))
    with pytest.raises(ValueError, match="no edit leaves 5 to 6 tokens"):
        edited(context, repository, Random(0), count, 5, 6)


def test_identical_tokens_are_counted_from_the_first() -> None:
    assert identical((1, 2, 3), (1, 2, 4)) == 2
    assert identical((1, 2), (1, 2, 3)) == 2
    assert identical((), (1,)) == 0 and identical((5,), (1,)) == 0


def test_agreement_is_by_the_tokens_of_full_prefill() -> None:
    full = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    other = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    found = agreement(reply((0, 1), full), reply((0, 2), other))
    assert (found.top1, found.identical) == (0.5, 1) and found.kl > 0
    assert agreement(reply((0, 1), full), reply((0, 1), full)) == Agreement(0.0, 1.0, 2)


def test_the_table_has_medians_by_ratio_and_by_kind(tmp_path: Path) -> None:
    fused = Fused(0.15, 2.0, 80, 12, 15, 5, Agreement(0.5, 0.75, 8))
    more = Fused(0.3, 4.0, 80, 24, 15, 5, Agreement(0.25, 1.0, 16))
    steps = [
        Step(0, "first", "", 100, 3, (fused,), 8.0),
        Step(1, "drop", "dropped a", 100, 3, (fused, more), 8.0),
        Step(2, "move", "moved b", 100, 3, (Fused(0.15, 1.0, 90, 10, 0, 10),)),
    ]
    shown = summary(steps)
    assert "2 edits of prompts of 100 to 100 tokens" in shown
    assert "| 0.15 | 2 | 85.0% | 74.0% | 1.5 | 4.0 | 1 | 75.0% | 8.0 | 0.5000 |" in shown
    assert "| 0.3 | 1 | 80.0% | 56.0% | 4.0 | 2.0 | 1 | 100.0% | 16.0 | 0.2500 |" in shown
    assert "| drop | 1 | 80.0% | 80.0% | 15 | 5 | 2.0 |" in shown
    assert "r=0.15: top-1 75%, 8 identical" in edits.line(steps[1])
    assert summary(steps[:1]) == "no edits are measured yet\n"


def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, repository: Repository
) -> None:
    monkeypatch.setattr(edits, "ROOT", repository.root)
    arguments = ["bench.edits", "--model", str(tiny_model_dir), "--out", str(tmp_path / "out")]
    arguments += ["--tokens", "1300", "--full-every", "2", "--ratio", "0.15", "--ratio", "0.3"]

    def run(steps: int) -> list[Step]:
        monkeypatch.setattr("sys.argv", [*arguments, "--steps", str(steps)])
        edits.main()
        return edits.load(tmp_path / "out" / "edits.jsonl")

    first = run(1)
    path = tmp_path / "out" / "edits.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, ')  # killed while it wrote
    found = run(2)
    assert found[:2] == first and [one.step for one in found] == [0, 1, 2]
    assert [one.full_s is not None for one in found] == [True, False, True]
    assert [len(one.fused) for one in found] == [2, 1, 2]
    for one in found:
        for each in one.fused:
            assert each.loaded + each.missed + each.texts == one.tokens


def reply(tokens: tuple[int, ...], logits: torch.Tensor) -> _Reply:
    report = Report("fused", {}, 0, 0, 0, 0, 0, 0.0, 0, 0.0, 0.0)
    return _Reply(tokens, "", 0, report, 0.0, logits, lambda: None)
