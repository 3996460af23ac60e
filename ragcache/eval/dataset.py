"""Data sets of questions with given chunks: the shipped format, and CacheBlend's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ragcache.errors import ConfigError, SourceError
from ragcache.util.list_argument import require_list

__all__ = ["EvalContext", "Question", "load_dataset", "load_datasets"]

LONG_WORDS = 8  # longer answers, by the median, are also scored by Rouge-L

#: Of long answers, and if their length is unknown, the whole text counts; of short ones, the first
#: line.
AnswerLength = Literal["short", "long", "unknown"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its correct answers."""

    text: str
    answers: tuple[str, ...]
    kind: str = "question"


@dataclass(frozen=True, slots=True)
class EvalContext:
    """Chunks in prompt order, and the questions asked over them."""

    chunks: tuple[str, ...]
    questions: tuple[Question, ...]


def load_dataset(path: Path) -> list[EvalContext]:
    """Read a data set from a ``.jsonl`` or ``.json`` file.

    ``.jsonl`` is the format of the shipped ``prompts.jsonl``. ``.json`` is CacheBlend's: a list of
    ``{"ctxs": [{"title", "text"}], "question", "answers"}``, where answers are a string, a list, or
    a list of lists. Raises SourceError, which names the malformed entry.
    """
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            entries = [(f"{path}:{n}", json.loads(line)) for n, line in lines if line.strip()]
            contexts = [_shipped_entry(entry, where) for where, entry in entries]
        else:
            contexts = [
                _cacheblend_entry(e, f"{path}[{n}]") for n, e in enumerate(json.loads(text))
            ]
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not valid JSON: {error}. Correct or remove it.") from error
    if not any(context.questions for context in contexts):
        raise SourceError(f"{path} has no questions: give every entry at least one")
    return contexts


def load_datasets(paths: Iterable[Path], limit: int | None = None) -> dict[str, list[EvalContext]]:
    """Read several data sets, by file name, or by path if two files have the same name.

    At most the first ``limit`` questions of each are kept.
    """
    unique = list(dict.fromkeys(require_list(paths, "paths")))
    names = Counter(path.name for path in unique)
    loaded = {
        str(path) if names[path.name] > 1 else path.name: load_dataset(path) for path in unique
    }
    if limit is None:
        return loaded
    return {name: first_questions(contexts, limit) for name, contexts in loaded.items()}


def read_questions(path: Path) -> list[str]:
    """Questions of a text file, one per line, ignoring blank lines.

    Raises SourceError if the file cannot be read or has no questions.
    """
    found = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not found:
        raise SourceError(f"{path} has no questions: write one per line")
    return found


def answer_length(contexts: Iterable[EvalContext]) -> AnswerLength:
    """Whether the correct answers are short: the median has at most :data:`LONG_WORDS` words.
    ``unknown`` if there are none."""
    words = [len(a.split()) for c in contexts for q in c.questions for a in q.answers]
    if not words:
        return "unknown"
    return "long" if median(words) > LONG_WORDS else "short"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot read the questions in {path}: {error}. Name a file of UTF-8 text that this "
            "user may read."
        ) from error


def first_questions(contexts: Iterable[EvalContext], limit: int) -> list[EvalContext]:
    """The first ``limit`` questions, with their contexts. Raises ConfigError for ``limit`` < 1."""
    if limit < 1:
        raise ConfigError(f"the limit is {limit}: ask at least 1 question")
    taken: list[EvalContext] = []
    for context in contexts:
        taken.append(EvalContext(context.chunks, context.questions[:limit]))
        limit -= len(taken[-1].questions)
        if limit == 0:
            break
    return taken


def spread_questions(contexts: Sequence[EvalContext], limit: int) -> list[EvalContext]:
    """``limit`` questions, spread over as many contexts as possible."""
    each = -(-limit // max(1, len(contexts)))
    return first_questions([EvalContext(c.chunks, c.questions[:each]) for c in contexts], limit)


def _shipped_entry(entry: Any, where: str) -> EvalContext:
    try:
        asked = [
            (q["question"], q["answers"], q.get("kind", "question")) for q in entry["questions"]
        ]
        return _context(entry["chunks"], asked)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(
            f"{where}: expected chunks and questions (question, answers, kind), but {error!r}"
        ) from error


def _cacheblend_entry(entry: Any, where: str) -> EvalContext:
    try:
        titles = [(c.get("title") or "", c["text"]) for c in entry["ctxs"]]
        chunks = [f"{title}\n\n{text}" if title else text for title, text in titles]
        return _context(chunks, [(entry["question"], entry["answers"], "question")])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(
            f"{where}: expected ctxs (title, text), question and answers, but {error!r}"
        ) from error


def _context(chunks: Iterable[str], asked: Iterable[tuple[str, Any, str]]) -> EvalContext:
    """Raises ValueError or AttributeError for texts that are blank or not strings."""
    questions = tuple(Question(_text(q), _answers(a), kind) for q, a, kind in asked)
    return EvalContext(tuple(map(_text, chunks)), questions)


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("a chunk or question is blank")
    return text


def _answers(given: Any) -> tuple[str, ...]:
    """The answers of a string, a list, or a list of lists. An answer may be empty."""
    items = [given] if isinstance(given, str) else given
    flat = [a for item in items for a in ([item] if isinstance(item, str) else item)]
    if not flat or not all(isinstance(a, str) for a in flat):
        raise ValueError(f"its answers are {given!r}")
    return tuple(flat)
