"""Known texts are found where they stand, the longest first, in linear time."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragcache.retriever.known_texts import KnownTexts

WORDS = ["ab", "cache", "a", "chunk of", "字", "🙂", "x" * 40, "The model reads"]


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def found(known: KnownTexts, text: str) -> list[tuple[str, str]]:
    return [(text[start:end], id) for start, end, id in known.find(text)]


def slow_find(texts: list[str], text: str) -> list[tuple[int, int, str]]:
    """The definition of :meth:`KnownTexts.find`."""
    ids: dict[str, str] = {}
    for number, known in enumerate(texts):
        if len(known.strip()) >= 16:
            ids.setdefault(known.strip(), str(number))

    def fits(known: str, start: int) -> bool:
        end = start + len(known)
        inside_word = re.match(r"[A-Za-z0-9]{2}", text[end - 1 : end + 1])
        return text.startswith(known, start) and not inside_word

    out, at = [], 0
    while at < len(text):
        in_word = at > 0 and re.match(r"\w", text[at - 1])
        known = "" if in_word else max((k for k in ids if fits(k, at)), key=len, default="")
        if known:
            out.append((at, at + len(known), ids[known]))
        at += len(known) or 1
    return out


def test_the_longest_is_found_and_none_within_words() -> None:
    short, long = "Mira Holt keeps a parrot", "Mira Holt keeps a parrot. It speaks."
    known = KnownTexts([(f"  {short}\n", "s"), (long, "l"), ("too short", "t"), (short, "again")])
    assert len(known) == 2
    text = f"<doc>{long}</doc>\n{short}\n\n{short}s\n\nS{short} too short {long}"
    assert found(known, text) == [(long, "l"), (short, "s"), (long, "l")]


def test_texts_are_added_one_by_one() -> None:
    known = KnownTexts()
    text = "The first text of all.\n\nThe second text of all."
    assert found(known, text) == [] and len(known) == 0
    for number, part in enumerate(text.split("\n\n"), 1):
        known.add(part, str(number))
        assert len(found(known, text)) == len(known) == number


def test_texts_are_read_lazily() -> None:
    with pytest.raises(ZeroDivisionError):
        KnownTexts((str(1 // n), "") for n in (1, 0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 9)), max_size=12),
)
def test_what_is_found_is_what_a_slow_search_finds(
    stored: list[tuple[int, int]], pieces: list[tuple[int, int, int]]
) -> None:
    # Few seeds: sentences of one seed begin alike, so that many texts do.
    texts = [sentence(seed, words)[:-1] for seed, words in stored]
    text = "".join(sentence(seed, words)[cut:] + "\n" for seed, words, cut in pieces)
    known = KnownTexts((text, str(number)) for number, text in enumerate(texts))
    assert [tuple(one) for one in known.find(text)] == slow_find(texts, text)


@pytest.mark.parametrize("length", [16, 63, 64, 65, 127, 128, 1000, 5000])
def test_every_length_is_found(length: int) -> None:
    text = sentence(1, length)[:length].strip().ljust(length, ".")
    known = KnownTexts([(text, "a"), (text + "!" * 700, "longer"), (text[:16], "shorter")])
    assert found(known, f"- {text}\n") == [(text, "a")]
    assert found(known, f"- {text[:-1]}?\n") != [(text, "a")]


def test_equal_hashes_are_not_equal_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragcache.retriever.known_texts._random_prime", lambda: 1)
    known = KnownTexts([("A text that is known here.", "a")])
    assert found(known, "A text that is known now!!") == []


def test_time_is_linear_whatever_is_known() -> None:
    head = sentence(2, 60)
    alike = KnownTexts((f"{head} {n} {n * n}" + " x" * (n % 300), str(n)) for n in range(3000))
    periodic = KnownTexts(("a " * n + "X", str(n)) for n in range(10, 1000))
    for known, piece in ((alike, head + " 7 and so on. "), (periodic, "a ")):
        start = time.process_time()
        text = piece * (20_000 // len(piece))
        assert found(known, text) == []
        assert time.process_time() - start < 5  # a quadratic search takes minutes
