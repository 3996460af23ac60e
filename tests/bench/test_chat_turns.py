"""Chats of unmodified clients, over a random model whose tokens spell every text."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from bench import chat_turns
from bench.chat_turns import Turn, line, show
from ragcache.eval.articles import ARTICLES
from tests import models, scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    models.model("llama", max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    tokenizer = deepcopy(models.tokenizer())
    tokenizer.chat_template = scene.CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_every_turn_is_measured(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    articles = tmp_path / "articles"
    articles.mkdir()
    for path in sorted(ARTICLES.iterdir())[:6]:
        (articles / path.name).write_text(path.read_text("utf-8")[:800], encoding="utf-8")
    monkeypatch.setattr(chat_turns, "ARTICLES", articles)
    monkeypatch.setattr(chat_turns, "MAX_TOKENS", 4)
    out = tmp_path / "turns.jsonl"
    given = ["bench.chat_turns", "--model", str(folder), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*given, "--tokens", "2500", "--rounds", "1"])
    chat_turns.main()
    turns = [TypeAdapter(Turn).validate_json(each) for each in out.read_bytes().splitlines()]
    kinds = [(one.client, one.documents) for one in turns]
    assert kinds[::3] == [("openai", "pasted"), ("openai", "beside"), ("ChatOpenAI", "pasted")]
    assert [one.turn for one in turns] == [1, 2, 3] * 3
    for one in turns:
        assert one.same_text and 0 < one.reused <= 1 and one.recomputed <= one.loaded
        assert one.ttft_s > 0 < one.full_s
        if one.turn > 1:
            assert one.reused >= 0.9
            assert (one.recomputed == 0) == (one.documents == "pasted")  # those do not move
    shown = capsys.readouterr().out
    assert show(turns) in shown and all(line(one) in shown for one in turns)


def test_the_table_has_medians_of_each_turn() -> None:
    one = Turn("openai", "pasted", 3, 1, 1000, 900, 100, 2.0, 10.0, True, "Yes.")
    turns = [one, replace(one, ttft_s=1.0), replace(one, ttft_s=2.5, same_text=False)]
    row = "| openai, documents pasted, turn 1 | 1,000 | 90.0% | 100 | 100 | 2.000 | 10.000 | 5.0 |"
    assert f"{row} 2 of 3 |" in show([*turns, replace(one, turn=2)])
    assert "ANOTHER TEXT" in line(turns[2]) and "ANOTHER TEXT" not in line(one)
