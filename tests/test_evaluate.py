"""Scores by kind and mode, and the two dataset formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragcache.dataset import Context, Question, load, take
from ragcache.errors import ConfigError, SourceError
from ragcache.evaluate import MODES, evaluate, exact_match, f1, modes
from ragcache.store.memory import MemoryStore
from tests import models

CONTEXT = Context(
    ("Mira Holt plays the cello.", "She was born in Oslo."),
    (Question("Where?", ("Oslo",), "split"), Question("What?", ("cello",), "direct")),
)


def test_every_mode_is_scored_on_every_question() -> None:
    engine, store = models.engine("llama"), MemoryStore()
    chosen = modes(["full", "reuse", "cacheblend"])
    scores = {s.mode: s for s in evaluate(engine, store, [CONTEXT] * 2, chosen, max_tokens=3)}
    assert all(s.asked == {"split": 2, "direct": 2} for s in scores.values())
    full, reuse, blend = (scores[m].summary() for m in chosen)
    assert (full["charged_budget"], reuse["charged_budget"]) == (1, 0)
    assert 0.5 < blend["charged_budget"] < 1  # two of four layers in full
    assert full["bytes_loaded"] == 0 < reuse["bytes_loaded"]
    assert full["ttft_speedup"] == 1
    assert store.stats().chunks == 0  # nothing is left behind


def test_the_right_answer_counts() -> None:
    assert exact_match(" The Oslo.", ["Bergen", "oslo"])
    assert not exact_match("Oslo fjord", ["Oslo"])
    assert f1("Oslo fjord", ["Oslo"]) == pytest.approx(2 / 3)
    assert f1("", ["Oslo"]) == 0


def test_cacheblends_format_nested_or_not(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    ctxs = [{"title": "Mira", "text": "She plays."}, {"title": "", "text": "No title."}]
    entries = [
        {"ctxs": ctxs, "question": "Who?", "answers": ["Mira", "Holt"]},
        {"ctxs": ctxs, "question": "Who?", "answers": [["Mira", "Holt"]]},
    ]
    path.write_text(json.dumps(entries))
    first, second = load(path)
    assert first == second
    assert first.chunks == ("Mira\n\nShe plays.", "No title.")
    assert first.questions[0].answers == ("Mira", "Holt")


def test_the_shipped_prompts_load(tiny_model_dir: Path) -> None:
    contexts = load(tiny_model_dir / "world" / "prompts.jsonl")
    kinds = {q.kind for c in contexts for q in c.questions}
    assert {"direct", "local", "split"} <= kinds


def test_take_cuts_inside_a_context() -> None:
    taken = take([CONTEXT] * 3, 3)
    assert [len(c.questions) for c in taken] == [2, 1]
    with pytest.raises(ConfigError, match="at least 1"):
        take([CONTEXT], 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"chunks": ["x"]}', "a.jsonl:1: expected chunks and questions"),
        ("a.json", '[{"question": "x"}]', r"a.json\[0\]: expected ctxs"),
        ("a.json", "[", "is not valid JSON"),
        ("a.json", "[]", "holds no questions"),
    ],
)
def test_broken_datasets_name_the_entry(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        load(tmp_path / name)
    with pytest.raises(SourceError, match="cannot read the questions"):
        load(tmp_path / "missing.json")


def test_a_ratio_goes_to_the_modes_that_take_one() -> None:
    made = modes(None, 0.3)
    assert list(made) == list(MODES)
    assert made["cacheblend"].parameters["recompute_ratio"] == 0.3
    with pytest.raises(ConfigError, match="none of the modes full, reuse takes a ratio"):
        modes(["full", "reuse"], 0.3)
    with pytest.raises(ConfigError, match="mode 'blend' is unknown"):
        modes(["blend"])
