"""Promises on halves of saved outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import promise as bench
from ragcache.eval.dataset import EvalContext, Question
from ragcache.eval.evaluate import make_blenders
from ragcache.eval.outcomes import AskedQuestion, ModeOutcomes, QuestionOutcome
from ragcache.eval.outcomes_file import OutcomesFile, run_header
from ragcache.eval.promise import Promise
from ragcache.settings import Settings

CONTEXTS = [EvalContext((f"Street {n}.",), (Question("Where?", ()),)) for n in range(200)]


def outcome(
    context: int, same: bool, charged: float, margin: float | None = None
) -> QuestionOutcome:
    return QuestionOutcome(
        context, "", True, 1, None, 0, True, 0, 1, same, 1, 1, 0, charged, 0, same, margin
    )


def saved(path: Path, risk: float, *, margins: bool = False) -> Path:
    """Of 200 contexts: reuse always disagrees, fused in a share ``risk`` of cases at 10 %. The
    margins of those are below 2; so are as many of others."""
    asked = {"set": CONTEXTS}
    modes = make_blenders(["full", "none", "reuse"]) | {
        "fused@10%": make_blenders(["fused"])["fused"]
    }
    header = run_header(Settings.load(), asked, modes, max_tokens=16, instruction="")
    file = OutcomesFile.open(path, header)
    for number in range(len(CONTEXTS)):
        hard = number < risk * len(CONTEXTS)
        costs = {"full": (True, 1.0), "none": (False, 0.0), "reuse": (False, 0.0)}
        each = costs | {"fused@10%": (not hard, 0.1)}
        unsure = number < 2 * risk * len(CONTEXTS)
        margin = (1.6 if unsure else 9.0) if margins else None
        outcomes = {mode: outcome(number, *found, margin) for mode, found in each.items()}
        file.append("set", number, AskedQuestion("m", outcomes))
    file.close()
    return path


def test_promises_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [saved(tmp_path / f"{risk}_outcomes.jsonl", risk) for risk in (0.0, 0.07)]
    given = "bench.promise", *map(str, files), "--epsilon", "0.05", "--disagreement", "tokens"
    monkeypatch.setattr("sys.argv", [*given, "--calibrations", "300"])
    bench.main()
    sure, risky = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert sure[0] == "| 0.0, set"
    assert sure[2:] == ["100", "no", "0.0%", "0.0%", "0.0%", "0.0%", "10.0%", "0.0% |"]
    broken, full = (float(cell.rstrip("% |")) for cell in (risky[5], risky[-1]))
    assert 0 <= broken <= 5 and full == 100 - broken  # its risk is above ε: full prefill is right


def test_one_question_of_each_context_counts() -> None:
    numbers = [0, 0, 1]
    each = [outcome(number, bool(place), 0.1) for place, number in enumerate(numbers)]
    [[[one]]] = bench.candidates([ModeOutcomes("fused@10%", "fused", {}, each)], "answer")
    assert one.failed.tolist() == [True, False]
    few = bench.resample([[[one]]], Promise(0.05), 3)
    assert few == bench.Kept(0, 0, 0, 0, 1, 1)  # one question promises nothing


def test_escalation_promises_what_no_method_alone_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(saved(tmp_path / "a_outcomes.jsonl", 0.15, margins=True))
    given = "bench.promise", file, "--epsilon", "0.05", "--calibrations", "50"
    monkeypatch.setattr("sys.argv", [*given, "--method", "fused"])
    bench.main()
    plain, with_it = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert plain[3:] == ["no", "0.0%", "0.0%", "0.0%", "0.0%", "100.0%", "100.0% |"]
    assert with_it[3:7] == ["yes", "0.0%", "0.0%", "0.0%"] and with_it[-1] == "0.0% |"
    escalated, charged = (float(cell.rstrip("%")) for cell in with_it[7:9])
    assert escalated == pytest.approx(30, abs=2) and charged == pytest.approx(10 + escalated)
