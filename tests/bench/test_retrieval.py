"""The benchmark of retrieval: recall and nDCG by value, and a small file from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.retrieval import Paragraphs, measure, measures, read
from ragcache.retriever.embed import HashEmbedder
from ragcache.retriever.search import Retriever


def test_recall_and_gain() -> None:
    recall, gain = measures(["a", "x", "b"], frozenset("abc"))
    assert recall == pytest.approx(2 / 3)
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert gain == pytest.approx((1 + 1 / math.log2(4)) / best)
    assert measures([], frozenset("a")) == (0, 0)
    assert measures(["a"], frozenset("a")) == (1, 1)


def test_every_paragraph_once_and_every_question_that_says_what_is_right(tmp_path: Path) -> None:
    first, second = {"title": "Oslo", "text": "A town."}, {"title": "Avon", "text": "A river."}
    records = [
        {"ctxs": [first, second], "question": "Which river?", "supporting": ["Avon"]},
        {"ctxs": [second], "question": "Which town?"},
        {"ctxs": [first], "question": "Which town?", "supporting": ["Oslo"]},
    ]
    file = tmp_path / "set.json"
    file.write_text(json.dumps(records))
    texts, asked = read([file, file])
    assert texts == ["Oslo\nA town.", "Avon\nA river."]
    assert [(one.text, one.right) for one in asked[:2]] == [
        ("Which river?", frozenset("1")),
        ("Which town?", frozenset("0")),
    ]
    embedder = HashEmbedder()
    retriever = Retriever(Paragraphs(texts, embedder), embedder, tmp_path / "vectors")
    for variant in ("dense", "bm25", "hybrid"):
        name, recall, gain, _ = measure(retriever, asked, variant)
        assert (name, recall[:6], gain[:6]) == (variant, "100.0%", "100.0%")
