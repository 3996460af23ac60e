"""Search by words: the formula of BM25, what a word is, and what is not found."""

from __future__ import annotations

import math
import sys
from random import Random

import pytest

from ragcache.errors import ConfigError
from ragcache.retriever.bm25 import BM25Index

K1, B = 1.5, 0.75


def reference(texts: list[list[str]], question: list[str]) -> list[float]:
    """Lucene's BM25 (Kamphuis et al., ECIR 2020), word by word."""
    mean = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for word in set(question):
        holding = sum(word in text for text in texts)
        weight = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for at, text in enumerate(texts):
            count = text.count(word)
            scores[at] += weight * count / (count + K1 * (1 - B + B * len(text) / mean))
    return scores


def test_rows_are_ranked_by_lucenes_bm25() -> None:
    random = Random(0)
    words = [f"w{n}" for n in range(30)]
    texts = [random.choices(words, k=random.randint(3, 40)) for _ in range(60)]
    rows = random.sample(range(1000), 60)
    index = BM25Index(rows, [" ".join(text) for text in texts])
    for _ in range(50):
        question = random.choices([*words, "unknown"], k=4)
        scores = reference(texts, question)
        found = index.search(" ".join(question), 10)
        want = sorted(
            (-round(score, 5), row) for score, row in zip(scores, rows, strict=True) if score
        )
        assert [-round(scores[rows.index(row)], 5) for row in found] == [s for s, _ in want][:10]
        among = sorted(random.sample(rows, 20))
        here = [row for row in index.search(" ".join(question), 60) if row in among]
        assert index.search(" ".join(question), 60, among) == here  # type: ignore[arg-type]


def test_ties_go_to_the_smaller_row() -> None:
    index = BM25Index([7, 3, 5], ["same text"] * 3)
    assert index.search("text", 2) == [3, 5]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Die Straße nach Århus", "STRASSE? nein: straße"),
        ("version 4.2 of KV-cache", "kv"),
        ("東京は日本の首都です", "首都"),
        ("서울은 대한민국의 수도", "수도"),
        ("isn't it", "ISN"),
        ("a b c", "c"),
    ],
)
def test_words_of_all_languages_are_found(text: str, question: str) -> None:
    assert BM25Index([1, 2], ["nothing of it here", text]).search(question, 5) == [2]


def test_what_shares_no_word_is_not_found() -> None:
    index = BM25Index([1, 2], ["one two", ""])
    assert index.search("three", 5) == [] and index.search("...", 5) == []
    assert BM25Index([], []).search("one", 5) == []
    assert BM25Index([1], ["..."]).search("one", 5) == []


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"needs bm25s: pip install 'ragcache-fusion\[hybrid\]'"):
        BM25Index([1], ["one"])
