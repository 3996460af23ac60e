"""Boundaries depend on nearby text only, and lie within their distances, whatever the text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ragcache.retriever import boundaries as module
from ragcache.retriever.boundaries import boundaries

MIN = 24
REACH = 5 * MIN + 400  # how far from an edit a boundary may change
WORDS = "the of and model cache chunk token prompt layer value store reads writes keeps".split()
#: Lines and other pieces of texts, some of them so often that texts repeat themselves.
PIECES = st.one_of(
    st.sampled_from(
        [
            "\n",
            "\r\n",
            "\f",
            " ",
            "same line\n",
            "# Heading\n",
            "```\n",
            "```python\n",
            "    x = 1\n",
        ]
        + ["<file a>\n", "</file>\n", "<div>\n", "x" * 60, "。", "字" * 30, "\\n", '{"a":1,"b":2}']
    ),
    st.builds(
        lambda seed, end: " ".join(random.Random(seed).choices(WORDS, k=1 + seed % 12)) + end,
        st.integers(0, 10**6),
        st.sampled_from([".\n", ". ", "\n", "\n\n", ",", "!\r\n"]),
    ),
    st.text(max_size=12),
)
TEXTS = st.lists(PIECES, max_size=120).map("".join)


def prose(seed: int, lines: int, end: str = "\n") -> str:
    words = random.Random(seed)
    return "".join(" ".join(words.choices(WORDS, k=9)) + end for _ in range(lines))


def lengths(text: str, min_chars: int = MIN) -> list[int]:
    return [end - start for start, end in pairwise([0, *boundaries(text, min_chars), len(text)])]


def local(text: str) -> list[int]:
    """The boundaries before long pieces are cut again."""
    return module._local_maxima(module._candidates(text, MIN), MIN)


def slow_maxima(candidates: list[tuple[int, int]], distance: int) -> list[int]:
    return [
        at
        for at, priority in candidates
        if all(
            other < priority or (other == priority and at <= place)
            for place, other in candidates
            if abs(place - at) < distance
        )
    ]


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
@example("a\n" * 300, "", "b\n", "a\n" * 300)
def test_an_edit_moves_no_boundary_far_away(before: str, old: str, new: str, after: str) -> None:
    was, now = local(before + old + after), local(before + new + after)
    first, last = len(before) - REACH, REACH
    assert [at for at in was if at <= first] == [at for at in now if at <= first]
    was = [at - len(before + old) for at in was]
    now = [at - len(before + new) for at in now]
    assert [at for at in was if at >= last] == [at for at in now if at >= last]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("x" * 5000)
@example("\r\n" * 3000)
def test_parts_are_within_their_lengths(text: str) -> None:
    found = lengths(text)
    assert sum(found) == len(text)
    assert all(MIN <= length for length in found[1:-1])
    assert all(length <= 8 * MIN for length in found)
    maxima = local(text)
    for start, end in pairwise([0, *maxima, len(text)]):  # cut again only where they are too long
        inner = [at for at in boundaries(text, MIN) if start < at < end]
        assert bool(inner) == (end - start > 8 * MIN)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=40), st.integers(1, 60))
def test_local_maxima_are_those_of_the_definition(
    steps: list[tuple[int, int]], distance: int
) -> None:
    candidates, at = [], 0
    for step, priority in steps:
        at += step
        candidates.append((at, priority))
    assert module._local_maxima(candidates, distance) == slow_maxima(candidates, distance)


def test_typical_parts_are_twice_the_least() -> None:
    found = lengths(prose(0, 5000), 384)
    assert 1.8 < sum(found) / len(found) / 384 < 2.3


@pytest.mark.parametrize("edit", ["", "one more line\n", "same line\n" * 5])
def test_in_a_run_of_equal_lines_an_edit_changes_few_parts(edit: str) -> None:
    text = prose(1, 40) + "same line\n" * 2000 + prose(2, 40)
    at = len(text) // 2 // 10 * 10
    edited = text[:at] + edit + text[at + 7 :]

    def parts(text: str) -> set[str]:
        return {text[a:b] for a, b in pairwise([0, *boundaries(text, MIN), len(text)])}

    assert len(parts(edited) - parts(text)) <= 6
    assert len(parts(text)) < 2 * len(lengths(prose(1, 40) + prose(2, 40)))  # most are equal


@pytest.mark.parametrize(
    "parts",
    [
        [""],
        ["one short line"],
        ["no cut near the ends\nof a short text, even so"],
        ["A question first.\n\n", "<file a>\n" + "x" * 50 + "\n</file>\n\n", "And one last."],
        ["Text.\r\n\r\n", "# Heading\r\n" + "x" * 50 + "\r\n", "## Next\r\nText"],
        ["A paragraph.\n\n\f\n", "The next one, of one line."],
    ],
)
def test_short_texts_are_cut_at_structure_only(parts: list[str]) -> None:
    text = "".join(parts)
    assert [text[a:b] for a, b in pairwise([0, *boundaries(text, MIN), len(text)])] == parts


@pytest.mark.parametrize(
    ("lines", "before"),
    [
        ("text\n<file path='a'>\n", "<file"),
        ("x\n</file>\nText\n", "Text"),
        ("Text\n\n# Heading\n\n", "# H"),
        ("Text\n## Heading\n", "##"),
        ("Text\n```python\nx\n", "```"),
        ("x\n```\nText\n", "Text"),
        ("return\n\ndef f():\n    x\n\n    y\n", "def"),
        ("return\n    x\n\n    y\n", "    y"),
    ],
)
def test_the_best_place_is_at_the_structure(lines: str, before: str) -> None:
    around = prose(3, 4), prose(4, 4)
    text = around[0] + lines + around[1]
    levels = dict(module._lines(text))
    best = max(levels, key=lambda at: levels[at])
    assert text.startswith(before, best)


@pytest.mark.parametrize(
    ("comment", "level"),
    [("x = 1\n# not a heading\n", "LINE"), ("Text\n<div>\n", "LINE"), ("Text\n<br/>\n", "LINE")],
)
def test_what_only_looks_like_structure(comment: str, level: str) -> None:
    ((_, found),) = module._lines(comment)
    assert found.name == level


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("She reads it. He keeps the value of it", " He"),
        ("模型读取缓存的所有值。然后回答所有人的问题", "然后"),
        ('{"text":"one line\\nand another one"}', "and"),
        ("aaaaaaaaaa,bbbbbbbbbbbbb", "b"),
        ("aaaaaaaaaa bbbbbbbbbbbbb", " b"),
    ],
)
def test_long_lines_are_cut_at_sentences_or_words(text: str, cut: str) -> None:
    found = boundaries(text, 9)
    assert any(text.startswith(cut, at) for at in found)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: prose(5, n // 50),
        lambda n: "same line\n" * (n // 10),
        lambda n: "\n" * n,
        lambda n: "x" * n,
        lambda n: "".join(random.Random(6).choices("abcdefghijklmnop", k=n)),
        lambda n: "<a " * (n // 3),
        lambda n: "</a" * (n // 3),
        lambda n: "." * n,
        lambda n: "```" * (n // 3),
        lambda n: "\\" * n,
    ],
)
def test_time_is_linear(make: Callable[[int], str]) -> None:
    def seconds(text: str) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            boundaries(text, 384)
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(make(20_000)), seconds(make(160_000))
    assert large < 8 * 4 * small + 0.05  # of quadratic time, 64 times
