"""LangChain's documents and ours: ids, and metadata that holds more than strings.

A document of LangChain is one of ours, under the same id. Metadata that are strings are kept as
they are, for whoever else reads the store; the rest is kept as JSON beside them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from langchain_core.documents import Document

from ragcache.errors import SourceError
from ragcache.retriever.split import WHOLE
from ragcache.store.catalog.catalog import Catalog
from ragcache.text import replace_surrogates_in
from ragcache.types import Chunk
from ragcache.types import Document as OurDocument
from ragcache.util.list_argument import require_list

_JSON = "langchain"  # the key of what is no string
_RESERVED = {_JSON, *WHOLE}


def from_document(document: Document, name: str, *, whole: bool) -> OurDocument:
    """Ours, called ``name``; ``whole``: one chunk, however long. SourceError for metadata that JSON
    cannot hold."""
    plain: dict[str, str] = {}
    other: dict[str, Any] = {}
    for key, value in document.metadata.items():
        if isinstance(value, str) and key not in _RESERVED:
            plain[key] = value
        else:
            other[key] = value
    if other:
        try:
            plain[_JSON] = json.dumps(replace_surrogates_in(other), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"the metadata of {name} cannot be kept: {error}. Give strings, numbers, lists "
                "and dictionaries."
            ) from error
    return OurDocument(name, document.page_content, plain | (WHOLE if whole else {}))


def from_documents(documents: Iterable[Document]) -> Iterator[OurDocument]:
    """What a loader gives, as documents that may be split: for ``RagCache.add`` and for
    :mod:`ragcache.batch`.

    One without an id is called by its ``source`` and its place among those of that source. Raises
    SourceError for metadata that JSON cannot hold.
    """
    places = Counter[str]()
    for document in require_list(documents, "documents", Document):
        source = str(document.metadata.get("source", "document"))
        name = f"{source}#{places[source]}" if document.id is None else document.id
        places[source] += 1
        yield from_document(document, name, whole=False)


def as_document(catalog: Catalog, chunk: Chunk) -> Document:
    """A chunk. One that is all of its document has its document's id; others are called
    ``document#ordinal``."""
    alone = len(catalog.rows_of(chunk.document)) == 1
    return Document(
        chunk.text,
        id=chunk.document if alone else chunk.id,
        metadata=metadata(chunk.metadata),
    )


def metadata(kept: Mapping[str, str]) -> dict[str, Any]:
    """LangChain's, of what :func:`from_document` has made of it."""
    plain = {key: value for key, value in kept.items() if key not in _RESERVED}
    other: dict[str, Any] = json.loads(kept.get(_JSON, "{}"))
    return plain | other
