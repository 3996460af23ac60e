"""Add any number of documents while only a portion of them is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ragcache.core.indexing import Added, Indexing, check_documents
from ragcache.core.precompute import Precomputed, TokenProgress, drive
from ragcache.errors import SourceError

if TYPE_CHECKING:
    from ragcache.types import Document, StageProgress

__all__ = ["add_stream"]

_DOCUMENTS = 500  # of a portion, at most
_CHARACTERS = 1 << 23  # of a portion: with the document that reaches it, a portion ends


def add_stream(
    indexing: Indexing,
    documents: Iterable[Document],
    *,
    ttl_s: float | None = None,
    pinned: bool | None = None,
    progress: StageProgress | None = None,
    tokens: TokenProgress | None = None,
    before: Callable[[list[Document]], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Added:
    """As :meth:`RagCache.add_stream`."""
    added, seen = Added(0, 0, 0, Precomputed(0, 0, 0, 0, 0.0)), set[str]()
    for portion in portions(documents):
        check_documents(portion, ttl_s)
        _check_new(portion, seen)
        if before is not None:
            before(portion)
        steps = indexing.iter_add(portion, ttl_s=ttl_s, pinned=pinned, tokens=tokens, refresh=False)
        added += drive(steps, progress)
        if after is not None:
            after()
    indexing.retriever.refresh()
    return added


def portions(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in order, in lists that depend on nothing else."""
    portion: list[Document] = []
    characters = 0
    for document in documents:
        portion.append(document)
        characters += len(document.text)
        if len(portion) == _DOCUMENTS or characters >= _CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def _check_new(portion: list[Document], seen: set[str]) -> None:
    """Raise SourceError if an id was in an earlier portion, then add the ids to ``seen``."""
    for document in portion:
        if document.id in seen:
            raise SourceError(
                f"the id {document.id!r} is given to several documents: one would replace the "
                "other. Give each document an id of its own. What was added before is kept."
            )
        seen.add(document.id)
