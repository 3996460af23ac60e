"""Converts between LangChain's documents and the store's.

A LangChain document is stored under its own id. Metadata values that are strings are stored as they
are, so that other readers of the store see them; all others are stored together as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from langchain_core.documents import Document

from ragcache.errors import SourceError
from ragcache.retriever.metadata import TYPED, typed_metadata
from ragcache.retriever.split import WHOLE
from ragcache.store.catalog.catalog import Catalog
from ragcache.text import replace_surrogates_in
from ragcache.types import Chunk
from ragcache.types import Document as StoreDocument
from ragcache.util.list_argument import require_list

_RESERVED = {TYPED, *WHOLE}


def from_document(document: Document, name: str, *, whole: bool) -> StoreDocument:
    """The document to store under the id ``name``. ``whole``: it is stored as one chunk, whatever
    its length. Raises SourceError for metadata that JSON cannot represent."""
    plain: dict[str, str] = {}
    other: dict[str, Any] = {}
    for key, value in document.metadata.items():
        if isinstance(value, str) and key not in _RESERVED:
            plain[key] = value
        else:
            other[key] = value
    if other:
        try:
            plain[TYPED] = json.dumps(replace_surrogates_in(other), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"the metadata of {name} cannot be stored as JSON: {error}. Give strings, numbers, "
                "lists and dictionaries."
            ) from error
    return StoreDocument(name, document.page_content, plain | (WHOLE if whole else {}))


def from_documents(documents: Iterable[Document]) -> Iterator[StoreDocument]:
    """A loader's documents for ``RagCache.add`` and :mod:`ragcache.batch`, which may split them.

    A document without an id gets its ``source`` and its number among the documents of that source
    as its id. Raises SourceError for metadata that JSON cannot represent.
    """
    numbers = Counter[str]()
    for document in require_list(documents, "documents", Document):
        source = str(document.metadata.get("source", "document"))
        name = f"{source}#{numbers[source]}" if document.id is None else document.id
        numbers[source] += 1
        yield from_document(document, name, whole=False)


def as_document(catalog: Catalog, chunk: Chunk) -> Document:
    """A chunk as a LangChain document. The only chunk of a document has the document's id; other
    chunks have the id ``document#ordinal``."""
    alone = len(catalog.rows_of(chunk.document)) == 1
    return Document(
        chunk.text,
        id=chunk.document if alone else chunk.id,
        metadata=langchain_metadata(chunk.metadata),
    )


def langchain_metadata(stored: Mapping[str, str]) -> dict[str, Any]:
    """The LangChain metadata that :func:`from_document` has stored."""
    return typed_metadata(stored)
