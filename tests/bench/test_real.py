"""A run on a model and a data set, in small: budgets, outcomes, continuation, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import real
from bench.budgets import Budgets
from bench.real_results import RunFiles

pytest.importorskip("matplotlib")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["bench.real", *map(str, arguments)])
    real.main()


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path) -> list[object]:
    """Arguments for a run of the small model, under the name of another one."""
    (tmp_path / "smollm2").symlink_to(tiny_model_dir)
    lines = [
        {
            "chunks": [f"Street {n}\n\nIt has {n} houses. They are old.", "A town.", "A river."],
            "questions": [{"question": f"How many houses has street {n}?", "answers": [str(n)]}],
        }
        for n in range(3)
    ]
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = ["--models", tmp_path, "--sets", tmp_path, "--out", tmp_path / "out"]
    methods = ["--method", "fused", "--method", "epic", "--method", "cachecraft"]
    budgets = ["--budget", 0.1, "--budget", 0.2, "--prompts", 1, "--max-tokens", 4]
    return ["--model", "smollm2", "--set", "hotpotqa", *folders, *methods, *budgets]


@pytest.mark.slow
def test_a_run_and_its_page(
    tmp_path: Path,
    inputs: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = RunFiles(tmp_path / "out", "smollm2", "hotpotqa")
    run(monkeypatch, *inputs, "--minutes", 0)
    assert "the time is up" in capsys.readouterr().out and files.budgets.exists()
    run(monkeypatch, *inputs)
    printed = capsys.readouterr().out
    assert "taken from" in printed and "smollm2, hotpotqa: 3 of 3 questions" in printed
    run(monkeypatch, *inputs)
    assert "3 of 3 questions are in" in capsys.readouterr().out

    changed = replace(Budgets.load(files.budgets), refused={"ape": "of its windows."})
    changed.save(files.budgets)
    page = tmp_path / "docs" / "real.md"
    page.parent.mkdir()
    run(monkeypatch, "--tables", files.out, "--page", page)
    text = page.read_text()
    assert "### SmolLM2-135M-Instruct, HotpotQA\n" in text and "3 questions." in text
    assert "| fused | `recompute_ratio=0." in text and "| full |  | 100.0 % |" in text
    assert "- ape cannot be used: of its windows.\n" in text
    assert "- At 10 %: " in text and "leads in KL" in text
    rows = text.partition("## Papers say, and we measured")[2]
    assert "| [EPIC](https://arxiv.org/abs/2410.15332) | up to 8 times sooner" in rows
    assert "| naive reuse |" in rows and "| 100 % |" in rows and "CacheBlend" not in rows
    assert "--models MODELS --sets SETS --out RESULTS" in text and str(tmp_path) not in text
    (figure,) = (page.parent / "figures").iterdir()
    assert f"(figures/{figure.name})" in text and figure.name.endswith("hotpotqa-answer-kl.svg")


def test_what_is_missing_is_said(
    tmp_path: Path,
    inputs: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "smollm2").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, *inputs)
    assert "run `python -m bench.real_models smollm2 --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--tables", tmp_path)
    assert "has no results: run `python -m bench.real --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", "smollm2")
    assert "give --model, --set, --models and --sets, or --tables" in capsys.readouterr().err
