"""How tokenising parts alone is compared with tokenising the whole text."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tokenising import Count, compare, differences, kinds, shown
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.types import Part, Prompt
from tests import models

IDS = st.lists(st.integers(0, 4), max_size=30).map(tuple)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine()


@settings(deadline=None)
@given(one=IDS, other=IDS)
def test_what_does_not_differ_is_equal(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    found = differences(one, other)
    a = c = 0
    for start, stop, first, last in found:
        assert one[a:start] == other[c:first]
        assert start < stop or first < last
        a, c = stop, last
    assert one[a:] == other[c:]
    assert bool(found) == (one != other)


def test_differences_are_no_longer_than_they_are() -> None:
    one = tuple(range(100))
    for start, stop, new in ((10, 11, (7, 7)), (50, 53, ()), (0, 0, (5,)), (99, 100, (1, 2))):
        other = one[:start] + new + one[stop:]
        blocks = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
        assert differences(one, other) == [b[1:] for b in blocks if b[0] != "equal"]


def test_a_boundary_within_a_word_is_named(engine: TransformersEngine) -> None:
    texts = "Her father built bo", "ats in Oslo."
    prompt = Prompt.of((), (engine.tokenize(texts[0]),), engine.tokenize(texts[1]))
    count = compare(engine, iter([(prompt, "".join(texts))]))
    assert (count.prompts, count.differing_prompts, count.boundaries) == (1, 1, 1)
    assert 1 <= count.differing_tokens <= 6 and count.tokens == len(prompt)
    [where] = count.reasons
    assert where.startswith("chunk ends with a letter or digit, text begins ")
    page = shown({("tiny", "words"): count})
    assert (
        f"| tiny | words | 1 | {len(prompt)} | 100.00% |" in page and f"| {where} | 100% |" in page
    )


def test_one_part_is_the_whole_text(engine: TransformersEngine) -> None:
    text = "The old mill in Bexley stands on the river Avon."
    prompt = Prompt((Part(engine.tokenize(text)),))
    assert compare(engine, iter([(prompt, text)])) == Count(1, 0, len(prompt), 0, 0)


def test_the_whole_texts_are_those_of_the_prompts(engine: TransformersEngine) -> None:
    for kind, made in kinds(engine, 1).items():
        if kind == "an agent's context":  # of the checkout's history
            continue
        [(prompt, text)] = made()
        pieces = "".join(engine.pieces(prompt.tokens))
        assert "".join(pieces.split()) == "".join(text.split()) and len(prompt.chunks) > 2
