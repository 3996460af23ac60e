"""Retrieval: read files, split them into chunks, embed, index and search.

::

    read(paths) → Document → Splitter → Chunk → Embedder → vectors → VectorIndex
                                                   question → Retriever → Passage

``source`` lists files and chooses a reader for each; ``readers`` reads files that are one document,
``record_readers`` files of many. ``formats`` and ``webpage`` extract text from Markdown, PDF and
HTML; ``encoding`` decodes bytes; ``extraction`` holds their result types and limits. ``split``
makes chunks, ``embed`` vectors (``embedder_files`` finds a model's files), and ``bm25`` searches
words. ``index`` and ``faiss_index`` search vectors exactly. ``approximate_index`` searches a
``base_index`` and ``fresh_rows``; ``index_build`` builds it and ``recall`` measures it. Files of
both are described in ``index_file``, ``faiss_stream`` and ``index_description``, and ``gpu_copy``
puts them on GPUs. ``current_index`` keeps the index of a catalog (``searched_catalog``) up to date,
of the kind that ``index_kind`` chooses, and ``search`` turns a question into passages by
``search_options``, ``metadata`` filters, ``ranking`` and ``rerank``. ``sentence_models`` loads
models for ``embed`` and ``rerank``.
``parts`` finds the chunks of a text that is no document, such as a message: ``known_texts`` those
of the store, and ``boundaries`` those between them.

Importing this package loads neither torch nor FAISS: names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Embedder",
    "FaissIndex",
    "HashEmbedder",
    "NumpyIndex",
    "Retriever",
    "SentenceTransformerEmbedder",
    "Splitter",
    "VectorIndex",
    "read",
]

if TYPE_CHECKING:
    from ragcache.retriever.embed import Embedder as Embedder
    from ragcache.retriever.embed import HashEmbedder as HashEmbedder
    from ragcache.retriever.embed import SentenceTransformerEmbedder as SentenceTransformerEmbedder
    from ragcache.retriever.faiss_index import FaissIndex as FaissIndex
    from ragcache.retriever.index import NumpyIndex as NumpyIndex
    from ragcache.retriever.index import VectorIndex as VectorIndex
    from ragcache.retriever.search import Retriever as Retriever
    from ragcache.retriever.source import read as read
    from ragcache.retriever.split import Splitter as Splitter
else:  # type checkers must not see __getattr__: with it, they would accept any name
    _HOME = {
        "Embedder": "embed",
        "FaissIndex": "faiss_index",
        "HashEmbedder": "embed",
        "NumpyIndex": "index",
        "Retriever": "search",
        "SentenceTransformerEmbedder": "embed",
        "Splitter": "split",
        "VectorIndex": "index",
        "read": "source",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
