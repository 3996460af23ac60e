"""Example questions about a store's documents, for new users.

If the store holds articles of the demo, or documents of the small model's data set, they are the
questions that come with these; otherwise they name the first documents of the store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES
from ragcache.models import world_file

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.store.catalog.documents import DocumentEntry

_LIMIT = 4


def example_questions(cache: RagCache, limit: int = _LIMIT) -> list[str]:
    """Up to ``limit`` questions, each about a stored document."""
    entries = cache.documents()
    sources = (
        _from_articles(cache, entries),
        _from_world(cache, entries, limit),
        _from_titles(entries),
    )
    return next(filter(None, (list(islice(found, limit)) for found in sources)), [])


def _from_articles(cache: RagCache, entries: Iterable[DocumentEntry]) -> Iterator[str]:
    """Questions about articles that are stored with the demo's text."""
    names = {entry.id.rpartition("/")[2]: entry.id for entry in entries}
    for known in ARTICLE_QUESTIONS:
        text = (ARTICLES / known.file).read_text(encoding="utf-8")
        if known.file in names and _holds(cache, names[known.file], text):
            yield known.question.text


def _from_world(cache: RagCache, entries: Iterable[DocumentEntry], limit: int) -> Iterator[str]:
    """Questions of each kind in turn, about documents that are stored with the data set's text."""
    names = {entry.id.rpartition("#")[2]: entry.id for entry in entries}
    texts = {one["id"]: one["text"] for one in _lines("documents.jsonl") if one["id"] in names}
    if not texts:
        return
    kinds: dict[str, list[str]] = {}
    for question in _lines("questions.jsonl"):
        name = question["document"]
        if name in texts and _holds(cache, names[name], texts[name]):
            kinds.setdefault(question["kind"], []).append(question["question"])
    turns = [
        kinds[kind] for kind in sorted(kinds, reverse=True)
    ]  # "split" first, which full reuse answers wrong
    for number in range(limit):
        if turns and number // len(turns) < len(turns[number % len(turns)]):
            yield turns[number % len(turns)][number // len(turns)]


def _holds(cache: RagCache, name: str, text: str) -> bool:
    with suppress(KeyError):  # deleted meanwhile
        chunks = cache.catalog.chunks(cache.catalog.rows_of(name))
        return bool(chunks) and all(chunk.text.strip() in text for chunk in chunks)
    return False


def _from_titles(entries: Iterable[DocumentEntry]) -> Iterator[str]:
    for entry in entries:
        title = entry.metadata.get("title", "").strip() or _title(entry.id)
        if re.search(r"[^\W\d_]{2}", title):  # a word, not only a number
            yield f"What does “{title}” say?"


def _title(name: str) -> str:
    """A title from an id: ``guides/set-up.md`` becomes "set up"."""
    last = PurePosixPath(name.rpartition("#")[2] or name)
    return re.sub(r"[-_\s]+", " ", last.stem).strip()


def _lines(name: str) -> list[dict[str, str]]:
    with world_file(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
