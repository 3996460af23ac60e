"""Chunks fit, end where sentences end, and together are the document."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from tokenizers import Tokenizer

from ragcache.errors import ConfigError
from ragcache.retriever import split
from ragcache.retriever.split import WHOLE, Splitter
from ragcache.types import Document
from tests.retriever.conftest import SENTENCES

STORY = Document("story.txt", "\n\n".join([" ".join(SENTENCES)] * 5), {"source": "story.txt"})


def bare(text: str) -> str:
    return re.sub(r"\s", "", text)


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def noise(seed: int) -> str:
    letters = random.Random(seed)
    return "".join(letters.choices("ab de. F\n\n!?🙂é ,中文#-*`|>1)\t\u00a0", k=400))


def test_chunks_are_runs_of_whole_sentences(tokenizer: Tokenizer) -> None:
    chunks = Splitter(tokenizer, 48).split(STORY)
    assert len(chunks) > 5
    for chunk in chunks:
        assert chunk.text.startswith(SENTENCES) and chunk.text.endswith(SENTENCES)
    assert [c.ordinal for c in chunks] == list(range(len(chunks)))
    assert {c.document for c in chunks} == {"story.txt"}
    assert all(c.metadata == STORY.metadata for c in chunks)


def test_paragraphs_stay_together_where_they_fit(tokenizer: Tokenizer) -> None:
    paragraph = " ".join(SENTENCES)
    splitter = Splitter(tokenizer, count(tokenizer, paragraph) + 5)
    assert [c.text for c in splitter.split(STORY)] == [paragraph] * 5


def test_split_is_deterministic(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_str(tokenizer.to_str())
    assert Splitter(tokenizer, 30).split(STORY) == Splitter(again, 30).split(STORY)


@pytest.mark.parametrize("form", ["text", "markdown"])
@pytest.mark.parametrize("size", [8, 21, 64])
def test_nothing_is_lost_and_nothing_too_long(tokenizer: Tokenizer, form: str, size: int) -> None:
    for text in [STORY.text, *map(noise, range(20))]:
        chunks = Splitter(tokenizer, size).split(Document("d", text, {"format": form}))
        assert bare("".join(c.text for c in chunks)) == bare(text)
        assert all(0 < count(tokenizer, c.text) <= size for c in chunks)


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_overlap_repeats_whole_sentences_within_the_limit(tokenizer: Tokenizer, form: str) -> None:
    story = Document("d", STORY.text, {"format": form})
    chunks = Splitter(tokenizer, 60, overlap_tokens=30).split(story)
    shared = 0
    for a, b in zip(chunks, chunks[1:], strict=False):
        first = next(s for s in SENTENCES if b.text.startswith(s))
        shared += first in a.text
        assert count(tokenizer, b.text) <= 60
    assert shared > 3


def test_markdown_splits_at_headings() -> None:
    text = "# One\n\nshort text here\n\n# Two\n\nmore short text"
    splitter = Splitter(lambda s: len(s.split()), 6)
    texts = [c.text for c in splitter.split(Document("d", text, {"format": "markdown"}))]
    assert texts == ["# One\n\nshort text here", "# Two\n\nmore short text"]


@pytest.mark.parametrize("text", ["", " \n\t ", "\n\n"])
def test_no_text_no_chunks(tokenizer: Tokenizer, text: str) -> None:
    assert Splitter(tokenizer, 8).split(Document("d", text)) == []


def test_truncation_and_padding_of_the_tokenizer_do_not_count(tokenizer: Tokenizer) -> None:
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=16)
    assert Splitter(cut, 30).split(STORY) == Splitter(tokenizer, 30).split(STORY)
    assert cut.truncation is not None and cut.padding is not None
    assert Splitter(cut, 30).describe() == Splitter(tokenizer, 30).describe()


def test_a_character_longer_than_a_chunk_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"d: '🙂' is 4 tokens and cannot be cut to 2. Raise"):
        Splitter(tokenizer, 2).split(Document("d", "a 🙂 b"))


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-1, 0), (8, -1), (8, 8)])
def test_impossible_settings(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match="_tokens is"):
        Splitter(len, size, overlap)


def test_description_tells_settings_apart(tokenizer: Tokenizer) -> None:
    splitters = [
        *(Splitter(tokenizer, 64), Splitter(tokenizer, 65), Splitter(tokenizer, 64, 8)),
        *(Splitter(len, 64), Splitter(len, 64, tokenizer_name="characters")),
    ]
    assert len({s.describe() for s in splitters}) == 5
    assert Splitter(len, 64).describe() == (
        "split v3 chunk_tokens=64 overlap_tokens=0 tokenizer=callable"
    )


@pytest.mark.parametrize("text", [SENTENCES[0] * 50, "# One\n\ntext\n\n# Two\n\ntext"])
def test_a_whole_document_is_one_chunk(tokenizer: Tokenizer, text: str) -> None:
    document = Document("a", text, {"format": "markdown", **WHOLE})
    (chunk,) = Splitter(tokenizer, 8).split(document)
    assert (chunk.text, chunk.ordinal) == (text, 0)
    assert Splitter(tokenizer, 8).split(Document("a", " \n", WHOLE)) == []


def test_a_sentence_of_markdown_is_not_cut_at_its_code_or_links() -> None:
    text = (
        "# Notes\n\nThe old API is gone. The old `/v0` API was switched off on 14 March. "
        "A [link](http://a) to *something* is here. And one more sentence that is long.\n\n- one"
    )
    document = Document("a", text, {"format": "markdown"})
    found = [c.text for c in Splitter(lambda text: len(text.split()), 12).split(document)]
    assert found == [
        "# Notes",
        "The old API is gone.",
        "The old `/v0` API was switched off on 14 March.",
        "A [link](http://a) to *something* is here.",
        "And one more sentence that is long.\n\n- one",
    ]


@pytest.mark.parametrize("own", [0, 1, 2])
def test_sentences_of_rare_characters_are_cut(tokenizer: Tokenizer, own: int) -> None:
    # Characters of three bytes and three tokens each, and tokens that every chunk has besides.
    drawn = random.Random(own)
    signs = ["".join(chr(drawn.randrange(0x4E00, 0x9FA5)) for _ in range(n)) for n in range(15, 30)]
    text = "".join(f"{sentence}。" for sentence in signs)
    splitter = Splitter(lambda text: count(tokenizer, text) + own, 64)
    chunks = splitter.split(Document("d", text))
    assert "".join(c.text for c in chunks) == text
    assert all(splitter.count(c.text) <= 64 for c in chunks)


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_long_documents_are_split_as_in_one_piece(
    tokenizer: Tokenizer, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random.Random(0)
    blocks = ["## Of the river", "- one\n- two\n  - deep", "```sh\n\n# no heading\nrow\n```"]
    parts = [" ".join(drawn.choices(SENTENCES, k=drawn.randint(1, 12))) for _ in range(200)]
    text = "\n\n".join(part for p in parts for part in (drawn.choice(blocks), p))
    document, splitter = Document("d", text, {"format": form}), Splitter(tokenizer, 32)
    windowed = splitter.split(document)
    monkeypatch.setattr(split, "_WINDOW", len(text))
    assert [c.text for c in windowed] == [c.text for c in splitter.split(document)]


HOSTILE = {
    "one letter": "a",
    "one word": "abcdefghij",
    "words": "word ",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d",
    "accents": "\u0301",
    "Chinese": "北京是中华人民共和国的首都",
    "spaces": " ",
    "rules": "-",
    "lines": "a\n",
    "open code": "```\n\n# x\n",
    "quotes": ">",
    "items": "- a\n",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", ["text", "markdown"])
def test_work_grows_with_the_text_only(tokenizer: Tokenizer, unit: str, form: str) -> None:
    counted: list[int] = []

    def counting(text: str) -> int:
        counted.append(len(text))
        return count(tokenizer, text)

    splitter = Splitter(counting, 16)
    work, first = list[int](), list[int]()
    for size in (8192, 16384):
        counted.clear()
        found = splitter.chunks(Document("d", unit * (size // len(unit)), {"format": form}))
        list(islice(found, 1))
        first.append(sum(counted))
        list(found)
        work.append(sum(counted))
    assert work[1] < 2.5 * work[0] + 1000
    assert first[0] == first[1] < 100_000  # the first chunk waits for none of the later ones


def test_a_stretch_without_a_block_of_markdown_is_split_as_text(tokenizer: Tokenizer) -> None:
    code = "```\n" + "\n".join(f"row {n}" for n in range(2000)) + "\n```\n"
    text = f"# One\n\nfirst\n\n{code}\n# Two\n\nlast"
    chunks = Splitter(tokenizer, 16).split(Document("d", text, {"format": "markdown"}))
    assert bare("".join(c.text for c in chunks)) == bare(text)
    assert chunks[-1].text == "# Two\n\nlast"


def test_letters_that_hold_more_than_a_window(tokenizer: Tokenizer) -> None:
    text = "x" * 5000  # a token each thousand
    chunks = Splitter(lambda text: -(-len(text) // 1000), 2).split(Document("d", text))
    assert [len(c.text) for c in chunks] == [2000, 2000, 1000]


def test_japanese_is_cut_between_sentences() -> None:
    sentences = [
        *("水車小屋は川のそばにある。", "「静かな村だ。」", "と彼は言った。"),
        *("それは本当ですか？", "『はい！』", "と彼女は答えた。"),
    ]
    text = "".join(sentences)
    for size in range(15, 30):
        chunks = [c.text for c in Splitter(len, size).chunks(Document("a", text))]
        assert "".join(chunks) == text and max(map(len, chunks)) <= size
        assert all(chunk[-1] in "。！？」』" for chunk in chunks)


def test_source_code_is_cut_between_blocks() -> None:
    functions = [f"def f{n}(a):\n    if a:\n        return {n}\n    return a" for n in range(6)]
    text = "\n\n\n".join(functions)
    for size in (len(functions[0]), 2 * len(functions[0]) + 3):
        chunks = [c.text for c in Splitter(len, size).chunks(Document("a", text))]
        assert all(chunk.startswith("def f") and chunk.endswith("return a") for chunk in chunks)


@pytest.mark.parametrize("kind", ["docx", "pptx"])
def test_office_files_are_split_as_markdown(kind: str) -> None:
    text = "# One\n\nSome text.\n\nMore text.\n\n# Two\n\nThe rest."
    chunks = [c.text for c in Splitter(len, 40).chunks(Document("a", text, {"format": kind}))]
    assert chunks == ["# One\n\nSome text.\n\nMore text.", "# Two\n\nThe rest."]
