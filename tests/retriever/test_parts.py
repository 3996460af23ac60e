"""The segments of a text are the text, and the same chunks are found wherever they stand."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragcache.engine.template import SEPARATOR
from ragcache.retriever import parts
from ragcache.retriever.known_texts import KnownTexts
from ragcache.retriever.parts import find_parts
from ragcache.types import Segment
from tests.retriever.test_boundaries import TEXTS, prose

CHUNK = "A chunk that the store has."


def code(names: str) -> str:
    return "\n\n".join(
        f'def {name}(path):\n    """Read the {name}."""\n    with open(path) as file:\n'
        f'        lines = file.read().split("\\n")\n\n    return [line for line in lines if line]\n'
        for name in names.split()
    )


FILES = {
    "readers.py": code("header body index footer table record column row"),
    "writers.py": code("log event trace span"),
}
RESULT = json.dumps({"status": "failed", "output": code("error warning notice")})
LOG = "".join(f"12:00:{s:02} INFO worker-{s % 5} did {s * 7919 % 1000} rows\n" for s in range(30))
NOTES = f"# Notes\n\n## Readers\n\n{prose(8, 9)}\n## Writers\n\n{prose(9, 9)}\n"


def message(files: dict[str, str], question: str = "Why does the second test fail?") -> str:
    pasted = "".join(f'<file path="{name}">\n{text}</file>\n' for name, text in files.items())
    return (
        f"Here are the files that you asked for.\n\n{pasted}\nThe tool says:\n\n{RESULT}\n\n"
        f"```\n{LOG}```\n\n{NOTES}\n{question}"
    )


def joined(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def chunks(text: str) -> list[str]:
    return [segment.text for segment in find_parts(text) if segment.kind == "chunk"]


def test_the_separator_is_the_one_of_stored_chunks() -> None:
    assert parts._SEPARATOR == SEPARATOR


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.text(min_size=12, max_size=40), max_size=3), st.integers(1, 60))
def test_the_segments_are_the_text(text: str, stored: list[str], min_chars: int) -> None:
    known = KnownTexts((chunk, chunk) for chunk in [*stored, text[40:90], text[90:200]])
    found = find_parts(text, known, min_chars=min_chars)
    assert joined(found) == text and all(segment.text for segment in found)
    for before, after in zip(found, found[1:], strict=False):
        assert "chunk" in (before.kind, after.kind)
    for segment in found:
        if segment.id:
            assert (segment.stored or segment.text) == segment.id.strip() + SEPARATOR
            assert segment.kind == "chunk" and segment.text.startswith(segment.id.strip())
        else:
            assert segment.stored is None
            assert segment.kind == "text" or len(segment.text) >= min_chars or "</" in segment.text


@pytest.mark.parametrize("text", ["", " ", "\n" * 5000, "\r\n\t\f" * 500])
def test_blank_texts_have_no_chunks(text: str) -> None:
    assert find_parts(text) == ((Segment(text),) if text else ())


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (CHUNK, (Segment(CHUNK, "chunk", "d#0", CHUNK + "\n\n"),)),
        (CHUNK + "\n\n", (Segment(CHUNK + "\n\n", "chunk", "d#0"),)),
        (
            f"Notes:\n{CHUNK}\n\n\nWhy?",
            (
                Segment("Notes:\n"),
                Segment(CHUNK + "\n\n", "chunk", "d#0"),
                Segment("\nWhy?"),
            ),
        ),
        (
            f"<doc>{CHUNK}</doc>\r\n{CHUNK}\r\n\r\n",
            (
                Segment("<doc>"),
                Segment(CHUNK, "chunk", "d#0", CHUNK + "\n\n"),
                Segment("</doc>\r\n"),
                Segment(CHUNK, "chunk", "d#0", CHUNK + "\n\n"),
                Segment("\r\n\r\n"),
            ),
        ),
    ],
)
def test_known_chunks(text: str, segments: tuple[Segment, ...]) -> None:
    assert find_parts(text, KnownTexts([(f"\n{CHUNK} ", "d#0")])) == segments


def test_an_agents_message_is_cut_at_its_structure() -> None:
    found = find_parts(message(FILES))
    assert [(s.kind, len(s.text), s.text[:24], s.text[-12:]) for s in found] == [
        ("text", 40, "Here are the files that ", "asked for.\n\n"),
        ("chunk", 822, '<file path="readers.py">', " if line]\n\n\n"),
        ("chunk", 482, 'def record(path):\n    ""', "ine]\n</file>"),
        ("text", 1, "\n", "\n"),
        ("chunk", 660, '<file path="writers.py">', "ine]\n</file>"),
        ("text", 2, "\n\n", "\n\n"),
        ("chunk", 582, 'The tool says:\n\n{"status', ' line]\\n"}\n\n'),
        ("chunk", 613, "```\n12:00:00 INFO worker", "id 704 rows\n"),
        ("chunk", 472, "12:00:17 INFO worker-2 d", "1 rows\n```\n\n"),
        ("chunk", 469, "# Notes\n\n## Readers\n\nmod", " the store\n\n"),
        ("chunk", 452, "## Writers\n\ntoken chunk ", "yer store\n\n\n"),
        ("text", 30, "Why does the second test", "d test fail?"),
    ]


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (lambda files: files, 0),
        (lambda files: dict(reversed(files.items())), 0),
        (lambda files: {"readers.py": files["readers.py"]}, 0),
        (lambda files: {"new.py": code("other names of functions"), **files}, 1),
        (lambda files: files | {"writers.py": files["writers.py"].replace("trace", "tree")}, 1),
    ],
)
def test_an_edited_message_has_the_same_chunks(
    edit: Callable[[dict[str, str]], dict[str, str]], changed: int
) -> None:
    first = chunks(message(FILES))
    second = chunks(message(edit(FILES), "And the third one?"))
    assert len(set(second) - set(first)) <= changed
