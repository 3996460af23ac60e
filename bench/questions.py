"""Write data sets of real questions: ``python -m bench.questions hotpotqa_100.json --out DIR``.

Takes HotpotQA (CC BY-SA 4.0) or MuSiQue (CC BY 4.0) in CacheBlend's JSON with one more key:
``supporting``, the titles of the paragraphs that the answer follows from. Writes the format of the
shipped ``prompts.jsonl``:

- ``hotpotqa.jsonl``: the supporting paragraphs and four others, each paragraph a chunk that begins
  with its title;
- ``hotpotqa-split.jsonl``: the same paragraphs in the same order, each in two chunks, of which the
  second has no title;
- ``musique.jsonl``: all paragraphs.

Which other paragraphs are taken, and the order of all, depends on the question and the paragraphs
alone: the same question has the same prompt in every selection of questions.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ragcache.errors import SourceError

OTHERS = 4  # paragraphs of HotpotQA that do not support the answer
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Paragraph:
    title: str
    text: str
    supporting: bool

    @property
    def chunk(self) -> str:
        return f"{self.title}\n\n{self.text}" if self.title else self.text

    @property
    def halves(self) -> tuple[str, str]:
        """The title with the first half of the text, and the second half alone.

        The cut is the sentence end nearest to the middle, or the space nearest to it in a text of
        one sentence.
        """
        cuts = list(_SENTENCE_END.finditer(self.text)) or list(_SPACE.finditer(self.text))
        if not cuts:
            raise ValueError(f"the paragraph {self.text!r} has one word and cannot be split")
        cut = min(cuts, key=lambda found: abs(found.end() - len(self.text) / 2))
        ends = self.text[cut.start() : cut.end()].rstrip()  # quotes and brackets that close
        first = Paragraph(self.title, self.text[: cut.start()] + ends, self.supporting)
        return first.chunk, self.text[cut.end() :]


@dataclass(frozen=True)
class Entry:
    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[Paragraph, ...]

    def drawn(self, others: int | None = None) -> list[Paragraph]:
        """The supporting paragraphs with ``others`` of the others (None: all), in a random order
        that is the same in every call."""
        ranked = sorted(self.paragraphs, key=self._rank)
        numbers = [n for n, paragraph in enumerate(ranked) if not paragraph.supporting][:others]
        return [p for n, p in enumerate(ranked) if p.supporting or n in numbers]

    def _rank(self, paragraph: Paragraph) -> bytes:
        return sha256(f"{self.question}\0{paragraph.chunk}".encode()).digest()

    def line(self, chunks: Sequence[str]) -> str:
        asked = {"question": self.question, "answers": self.answers}
        return json.dumps({"chunks": chunks, "questions": [asked]}, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="+", help="names begin with hotpotqa or musique")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    given = parser.parse_args()
    try:
        for file in given.file:
            for path in write(file, given.out):
                print(f"wrote {path}")
    except SourceError as error:
        parser.exit(1, f"{error}\n")


def write(file: Path, out: Path) -> list[Path]:
    """Write the data sets of a file into the folder ``out``; returns their paths.

    Raises SourceError, which names the malformed entry.
    """
    made = data_sets(_source(file), read(file), file)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, lines in made.items():
        paths.append(out / f"{name}.jsonl")
        paths[-1].write_text("".join(lines), encoding="utf-8")
    return paths


def data_sets(source: str, entries: Sequence[Entry], where: Path) -> Mapping[str, list[str]]:
    """The lines of each data set, by its name. Raises SourceError."""
    if source == "musique":
        return {"musique": [e.line([p.chunk for p in e.drawn()]) for e in entries]}
    whole, split = [], []
    for number, entry in enumerate(entries):
        taken = entry.drawn(OTHERS)
        try:
            halves = [half for p in taken for half in p.halves]
        except ValueError as error:
            raise SourceError(f"{where}[{number}]: {error}") from error
        whole.append(entry.line([p.chunk for p in taken]))
        split.append(entry.line(halves))
    return {"hotpotqa": whole, "hotpotqa-split": split}


def read(file: Path) -> list[Entry]:
    """The entries of a file. Raises SourceError, which names the malformed one."""
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {file}: {error}. Name a JSON file of questions.") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{file} is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(loaded, list) or not loaded:
        raise SourceError(f"{file} has no questions: it must be a list of them")
    return list(_entries(loaded, file))


def _entries(loaded: Sequence[Any], file: Path) -> Iterator[Entry]:
    for number, entry in enumerate(loaded):
        try:
            supporting = set(entry["supporting"])
            paragraphs = tuple(
                Paragraph(c["title"].strip(), c["text"].strip(), c["title"] in supporting)
                for c in entry["ctxs"]
            )
            found = Entry(entry["question"].strip(), tuple(entry["answers"]), paragraphs)
            _check(found, supporting, {c["title"] for c in entry["ctxs"]})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SourceError(
                f"{file}[{number}]: expected question, answers, supporting (titles) and ctxs "
                f"(title, text), but {error!r}"
            ) from error
        yield found


def _check(entry: Entry, supporting: set[str], titles: set[str]) -> None:
    """Raises ValueError if something is missing or blank."""
    if not supporting or supporting - titles:
        missing = ", ".join(sorted(supporting - titles)) or "none is named"
        raise ValueError(f"supporting paragraphs are missing: {missing}")
    if not entry.question or not all(p.text for p in entry.paragraphs):
        raise ValueError("the question or a paragraph is blank")
    if not entry.answers or not all(isinstance(a, str) and a for a in entry.answers):
        raise ValueError(f"its answers are {entry.answers!r}")


def _source(file: Path) -> str:
    for source in ("hotpotqa", "musique"):
        if file.name.lower().startswith(source):
            return source
    raise SourceError(f"{file}: the name of the file must begin with hotpotqa or musique")


if __name__ == "__main__":
    main()
