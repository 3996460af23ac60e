"""Answers compared with correct ones, and logits with full prefill's, by value."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

import pytest
import torch

from ragcache.errors import ConfigError
from ragcache.eval.metrics import (
    exact_match,
    f1,
    first_token_kl,
    load_stemmer,
    rouge_l,
)

Score = Callable[[str, Iterable[str]], float]


def test_the_right_answer_counts() -> None:
    assert exact_match(" The Oslo.", ["Bergen", "oslo"])
    assert not exact_match("Oslo fjord", ["Oslo"])
    assert f1("Oslo fjord", ["Oslo"]) == pytest.approx(2 / 3)
    assert f1("in Oslo", ["Bergen", "Oslo in Norway"]) == pytest.approx(0.8)


@pytest.mark.parametrize("score", [exact_match, f1, rouge_l])
def test_an_empty_answer_is_wrong_unless_empty_is_right(score: Score) -> None:
    for blank in ("", " \n"):
        assert score(blank, ["Oslo"]) == 0
        assert score(blank, ["Oslo", ""]) == 1
        assert score("Oslo", [""]) == 0


@pytest.mark.parametrize("score", [exact_match, f1])
def test_an_answer_that_is_an_article_is_not_empty(score: Score) -> None:
    assert score("", ["A"]) == score("the", ["A"]) == score("", ["?"]) == 0
    assert score("a", ["A"]) == score("?", ["?"]) == 1


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [  # what rouge-score 0.1.2 gives with use_stemmer=True
        ("the cat was found under the bed", "the cat was under the bed", 12 / 13),
        ("police killed the gunman", "police kill the gunmen", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("She's running tests, 3 times!", "she ran a test 3 times", 2 / 3),
        ("nothing in common", "other words", 0),
    ],
)
def test_rouge_l_is_googles(text: str, answer: str, expected: float) -> None:
    assert rouge_l(text, [answer]) == pytest.approx(expected)
    assert rouge_l(text, ["zzz", answer]) == pytest.approx(expected)


def test_a_missing_stemmer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snowballstemmer", None)
    load_stemmer.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[rouge\]'"):
        rouge_l("a", ["b"])


def test_kl_is_from_full_to_the_mode_in_nats() -> None:
    full, mode = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert first_token_kl(full.log() + 7, mode.log()) == pytest.approx(want, rel=1e-6)
    assert first_token_kl(full, full) == 0
    masked = torch.tensor([0.0, -math.inf])  # a token that neither can say
    assert first_token_kl(masked, masked) == 0
