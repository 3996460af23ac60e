"""Questions that one may ask of a store, for somebody who has just come to it.

They are made from what the store holds: the small model's world has questions of its own, which are
given where its documents are there; of any other store they name its first documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ragcache.models import world

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.store.catalog.documents import DocumentEntry

_MOST = 4


def examples(cache: RagCache, most: int = _MOST) -> list[str]:
    """At most so many questions, none of which is about a document that is not there."""
    entries = cache.documents()
    return list(_of_the_world(cache, entries, most)) or list(_of_titles(entries))[:most]


def _of_the_world(cache: RagCache, entries: Iterable[DocumentEntry], most: int) -> Iterator[str]:
    """Of each kind in turn: those whose document is stored with the text that the world has."""
    names = {entry.id.rpartition("#")[2]: entry.id for entry in entries}
    texts = {one["id"]: one["text"] for one in _lines("documents.jsonl") if one["id"] in names}
    if not texts:
        return
    kinds: dict[str, list[str]] = {}
    for asked in _lines("questions.jsonl"):
        name = asked["document"]
        if name in texts and _holds(cache, names[name], texts[name]):
            kinds.setdefault(asked["kind"], []).append(asked["question"])
    turns = [kinds[kind] for kind in sorted(kinds, reverse=True)]  # split, which reuse gets wrong
    for number in range(most):
        if turns and number // len(turns) < len(turns[number % len(turns)]):
            yield turns[number % len(turns)][number // len(turns)]


def _holds(cache: RagCache, name: str, text: str) -> bool:
    with suppress(KeyError):  # deleted meanwhile
        chunks = cache.catalog.chunks(cache.catalog.rows_of(name))
        return bool(chunks) and all(chunk.text.strip() in text for chunk in chunks)
    return False


def _of_titles(entries: Iterable[DocumentEntry]) -> Iterator[str]:
    for entry in entries:
        title = entry.metadata.get("title", "").strip() or _spoken(entry.id)
        if re.search(r"[^\W\d_]{2}", title):  # a word, not only a number
            yield f"What does “{title}” say?"


def _spoken(name: str) -> str:
    """An id as its last part is said: ``guides/set-up.md`` is "set up"."""
    last = PurePosixPath(name.rpartition("#")[2] or name)
    return re.sub(r"[-_\s]+", " ", last.stem).strip()


def _lines(name: str) -> list[dict[str, str]]:
    with world(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
