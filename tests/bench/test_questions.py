"""Data sets of real questions: the same prompts in every selection, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.questions import Paragraph, read, write
from ragcache.errors import SourceError
from ragcache.eval.dataset import load_dataset


def entry(number: int, paragraphs: int = 10) -> dict[str, Any]:
    ctxs = [
        {"title": f"Town {number}.{n}", "text": f"It is a town. It has {n} streets. It is old."}
        for n in range(paragraphs)
    ]
    supporting = [ctxs[0]["title"], ctxs[3]["title"]]
    question = f"How many streets has town {number}?"
    return {"question": question, "answers": ["3"], "supporting": supporting, "ctxs": ctxs}


def saved(path: Path, entries: list[Any]) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_two_supporting_and_four_other_paragraphs(tmp_path: Path) -> None:
    entries = [entry(n) for n in range(5)]
    whole, split = write(saved(tmp_path / "hotpotqa_5.json", entries), tmp_path / "out")
    assert (whole.name, split.name) == ("hotpotqa.jsonl", "hotpotqa-split.jsonl")
    orders = set()
    for given, context in zip(entries, load_dataset(whole), strict=True):
        titles = [chunk.partition("\n\n")[0] for chunk in context.chunks]
        assert len(set(titles)) == len(titles) == 6 and set(given["supporting"]) < set(titles)
        assert context.questions[0].answers == ("3",)
        orders.add(tuple(title.partition(".")[2] for title in titles))
    assert len(orders) > 1


def test_halves_are_in_the_same_order_and_the_second_has_no_title(tmp_path: Path) -> None:
    file = saved(tmp_path / "hotpotqa.json", [entry(n) for n in range(3)])
    whole, split = map(load_dataset, write(file, tmp_path))
    for one, halves in zip(whole, split, strict=True):
        pairs = zip(halves.chunks[::2], halves.chunks[1::2], strict=True)
        assert tuple(f"{a} {b}" for a, b in pairs) == one.chunks
        assert all(second[0].isupper() and "Town" not in second for second in halves.chunks[1::2])


def test_a_selection_of_questions_has_the_same_prompts(tmp_path: Path) -> None:
    for name, paragraphs in (("hotpotqa", 10), ("musique", 20)):
        entries = [entry(n, paragraphs) for n in range(4)]
        every = write(saved(tmp_path / f"{name}.json", entries), tmp_path / "every")
        some = write(saved(tmp_path / f"{name}_2.json", entries[:0:-2]), tmp_path / "some")
        for a, b in zip(every, some, strict=True):
            assert load_dataset(a)[3::-2] == load_dataset(b)


def test_musique_keeps_all_paragraphs_in_another_order(tmp_path: Path) -> None:
    given = entry(0, 20)
    (path,) = write(saved(tmp_path / "musique.json", [given]), tmp_path)
    chunks = [f"{c['title']}\n\n{c['text']}" for c in given["ctxs"]]
    found = list(load_dataset(path)[0].chunks)
    assert sorted(found) == sorted(chunks) and found != chunks


def test_where_a_paragraph_is_cut() -> None:
    quoted = Paragraph("T", 'He said "No." Then he left for "Rome" in May.', True)
    assert quoted.halves == ('T\n\nHe said "No."', 'Then he left for "Rome" in May.')
    assert Paragraph("", "one two three four", True).halves == ("one two", "three four")
    with pytest.raises(ValueError, match="one word"):
        _ = Paragraph("T", "word", True).halves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"supporting": ["Nowhere"]}, r"\[1\].*supporting paragraphs are missing: Nowhere"),
        ({"supporting": []}, "none is named"),
        ({"answers": []}, r"its answers are \(\)"),
        ({"answers": [["3"]]}, "its answers are"),
        ({"question": " "}, "is blank"),
        ({"ctxs": [{"text": "Without a title."}]}, "KeyError"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = saved(tmp_path / "musique.json", [entry(0), entry(1) | change])
    with pytest.raises(SourceError, match=message):
        write(file, tmp_path)


def test_a_paragraph_of_one_word_cannot_be_split(tmp_path: Path) -> None:
    given = entry(0, 6)
    given["ctxs"][0]["text"] = "Word."
    with pytest.raises(SourceError, match=r"hotpotqa.json\[0\]: .*cannot be split"):
        write(saved(tmp_path / "hotpotqa.json", [given]), tmp_path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must begin with hotpotqa or musique"):
        write(saved(tmp_path / "squad.json", [entry(0)]), tmp_path)
    with pytest.raises(SourceError, match="cannot read"):
        read(tmp_path / "hotpotqa.json")
    with pytest.raises(SourceError, match="has no questions"):
        read(saved(tmp_path / "hotpotqa_0.json", []))
    (tmp_path / "musique.json").write_text("[")
    with pytest.raises(SourceError, match="is not valid JSON"):
        read(tmp_path / "musique.json")
