"""Questions with given chunks: the shipped world's format, and CacheBlend's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcache.errors import ConfigError, SourceError


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answers that count as right."""

    text: str
    answers: tuple[str, ...]
    kind: str = "question"


@dataclass(frozen=True, slots=True)
class Context:
    """Chunks, in prompt order, and the questions asked over them."""

    chunks: tuple[str, ...]
    questions: tuple[Question, ...]


def load(path: Path) -> list[Context]:
    """Contexts from a file: ``.jsonl`` as the shipped world's ``prompts.jsonl``, or CacheBlend's
    ``.json`` (a list of ``{"ctxs": [{"title", "text"}], "question", "answers"}``; some sets nest
    the answers one level). SourceError names the entry that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the questions in {path}: {error}") from error
    try:
        if path.suffix == ".jsonl":
            lines = enumerate(text.splitlines(), 1)
            entries = [(f"{path}:{n}", json.loads(line)) for n, line in lines if line.strip()]
            contexts = [_world(entry, where) for where, entry in entries]
        else:
            contexts = [_cacheblend(e, f"{path}[{n}]") for n, e in enumerate(json.loads(text))]
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not contexts:
        raise SourceError(f"{path} holds no questions")
    return contexts


def take(contexts: Iterable[Context], limit: int) -> list[Context]:
    """The first ``limit`` questions with their contexts."""
    if limit < 1:
        raise ConfigError(f"the limit is {limit}: ask at least 1 question")
    taken: list[Context] = []
    for context in contexts:
        taken.append(Context(context.chunks, context.questions[:limit]))
        limit -= len(taken[-1].questions)
        if limit == 0:
            break
    return taken


def _world(entry: Any, where: str) -> Context:
    try:
        questions = tuple(
            Question(q["question"], tuple(q["answers"]), q.get("kind", "question"))
            for q in entry["questions"]
        )
        return Context(tuple(entry["chunks"]), questions)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{where}: expected chunks and questions (question, answers, kind), but {error!r}"
        ) from error


def _cacheblend(entry: Any, where: str) -> Context:
    try:
        chunks = (
            f"{c['title']}\n\n{c['text']}" if c.get("title") else c["text"] for c in entry["ctxs"]
        )
        answers = entry["answers"]
        flat = [a for item in answers for a in (item if isinstance(item, list) else [item])]
        return Context(tuple(chunks), (Question(entry["question"], tuple(flat)),))
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{where}: expected ctxs (title, text), question and answers, but {error!r}"
        ) from error
