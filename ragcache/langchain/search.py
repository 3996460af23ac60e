"""Search and deletion for the vector store, to run on the backend's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from langchain_core.documents import Document
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from ragcache.errors import ConfigError
from ragcache.langchain.documents import as_document
from ragcache.rag import RagCache
from ragcache.retriever import metadata
from ragcache.util.list_argument import require_list

#: The metadata that a document must have, or a predicate of a document.
Filter = metadata.Filter | Callable[[Document], bool]
_Query = str | NDArray[np.float32]


def delete_documents(cache: RagCache, ids: Sequence[str] | None) -> bool:
    """Delete documents; None: all of them. Raises ConfigError, and deletes nothing, for the id of a
    chunk."""
    ids = [e.id for e in cache.documents()] if ids is None else list(require_list(ids, "ids"))
    for name in ids:
        document, ordinal = _parts(name)
        if ordinal is not None and cache.catalog.entry(name) is None:
            if len(cache.catalog.rows_of(document)) > ordinal:
                raise ConfigError(
                    f"{name} is a chunk of {document!r}: delete that document, or add it again "
                    "without this text"
                )
    cache.delete(ids)
    return True


def get_by_ids(cache: RagCache, ids: Sequence[str]) -> list[Document]:
    """The chunks of each document with one of these ids, and the chunks with one of these ids."""
    catalog = cache.catalog
    catalog.expire(time.time())
    found = []
    for name in require_list(ids, "ids"):
        rows = catalog.rows_of(name)
        document, ordinal = _parts(name)
        if not rows and ordinal is not None:
            rows = catalog.rows_of(document)[ordinal : ordinal + 1]
        found += [as_document(catalog, chunk) for chunk in catalog.chunks(rows)]
    return found


def _parts(name: str) -> tuple[str, int | None]:
    document, mark, ordinal = name.rpartition("#")
    return (document, int(ordinal)) if mark and ordinal.isdecimal() else (name, None)


def _search(
    cache: RagCache, query: _Query, k: int, filter: Filter | None
) -> list[tuple[int, Document, float]]:
    """Rows, documents and cosine similarities of the ``k`` most similar that pass the filter."""
    cache.catalog.expire(time.time())
    test = filter if callable(filter) else None
    described = None if callable(filter) else filter
    fetch = k if test is None else 4 * k
    while True:
        hits = cache.retriever.ranked(query, fetch, described)
        found = []
        for row, passage in hits:
            document = as_document(cache.catalog, passage.chunk)
            if test is None or test(document):
                found.append((row, document, passage.score))
        if test is None:
            return found
        if len(found) >= k or fetch >= len(cache.retriever):
            return found[:k]
        fetch *= 4


def search_with_scores(
    cache: RagCache, query: _Query, k: int, filter: Filter | None
) -> list[tuple[Document, float]]:
    """Documents and cosine similarities, the most similar first."""
    return [(document, score) for _, document, score in _search(cache, query, k, filter)]


def search_mmr(
    cache: RagCache, query: _Query, k: int, fetch_k: int, lambda_mult: float, filter: Filter | None
) -> list[Document]:
    """Maximal marginal relevance among the ``fetch_k`` most similar."""
    found = _search(cache, query, max(k, fetch_k), filter)
    vectors = cache.catalog.vectors_of([row for row, _, _ in found])
    if isinstance(query, str):
        query = cache.retriever.embed_question(query)
    order = maximal_marginal_relevance(query, list(vectors), lambda_mult, k)
    return [found[at][1] for at in order]


def normalized(embedding: Sequence[float]) -> NDArray[np.float32]:
    """The vector scaled to length 1, as indexes compare them; the zero vector stays zero."""
    vector = np.asarray(embedding, np.float32)
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
