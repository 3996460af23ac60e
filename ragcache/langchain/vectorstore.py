"""The vector store: LangChain's documents, whose KV is computed when they are added."""

# Unlike the methods they override, these methods accept no unknown options.
# mypy: disable-error-code="override"

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from ragcache.errors import ConfigError, SourceError
from ragcache.langchain.documents import from_document
from ragcache.langchain.embeddings import StoreEmbeddings
from ragcache.langchain.local_backend import LocalBackend
from ragcache.langchain.search import (
    Filter,
    delete_documents,
    get_by_ids,
    normalized,
    search_mmr,
    search_with_scores,
)
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import StageProgress
from ragcache.util.list_argument import require_list


class RagCacheVectorStore(VectorStore):
    """Documents, their vectors and their chunks' KV in one ragcache store.

    ``store`` and ``settings`` as for :class:`ChatRagCache`; the store's embedder makes the vectors.
    By default a document is one chunk with its own id, since LangChain's documents are usually
    split already. With ``splitting`` the store splits documents as ``ragcache index`` does: a
    search then returns the chunks of a document one by one, with the ids ``id#0``, ``id#1``, ...,
    and deleting removes the whole document.

    Scores are cosine similarities, in [-1, 1]. A ``filter`` is a dictionary of metadata values and
    operators such as ``$gte``, see :class:`~ragcache.retriever.metadata.MetadataFilter`, or a
    predicate of a document, which is called for one document after the other. All operations take
    turns with the requests that are answered from the same store; an ``a...`` method never blocks
    the event loop.
    """

    def __init__(
        self,
        store: str | Path | RagCache,
        *,
        model: str = "",
        settings: Settings | None = None,
        splitting: bool = False,
    ) -> None:
        self.backend = LocalBackend.open(store, model, settings)
        self.splitting = splitting

    @property
    def embeddings(self) -> Embeddings:
        return StoreEmbeddings(self.backend)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str] | None = None,
        progress: StageProgress | None = None,
    ) -> list[str]:
        """Add texts as :meth:`add_documents` does, each with its metadata. Raises ConfigError if
        the numbers of texts and metadatas differ."""
        return self.add_documents(_documents(texts, metadatas), ids=ids, progress=progress)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str] | None = None,
        progress: StageProgress | None = None,
    ) -> list[str]:
        made = _documents(texts, metadatas)
        return await self.aadd_documents(made, ids=ids, progress=progress)

    def add_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str] | None = None,
        progress: StageProgress | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        """Embed and store documents and compute their chunks' KV; returns their ids.

        The ids are ``ids``, else the documents' own, else new ones. A document replaces one with
        the same id; an unchanged document costs nothing. ``progress(step, done, total)`` is called
        on the backend's thread. ``batch_size`` is accepted for LangChain's indexing, which has cut
        the list already, and ignored. Raises SourceError for a blank or too long document and for
        repeated ids, and ConfigError if ids or documents are not lists or differ in number; nothing
        is added then.
        """
        named = _named(documents, ids)
        self.backend.run(lambda cache: self._add(cache, named, progress))
        return [name for name, _ in named]

    async def aadd_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str] | None = None,
        progress: StageProgress | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        named = _named(documents, ids)
        await self.backend.arun(lambda cache: self._add(cache, named, progress))
        return [name for name, _ in named]

    def delete(self, ids: list[str] | None = None) -> bool:
        """Delete documents, and KV that no other document uses; None: all of them. Unknown ids are
        ignored. Raises ConfigError for the id of a chunk of a split document."""
        return self.backend.run(lambda cache: delete_documents(cache, ids))

    async def adelete(self, ids: list[str] | None = None) -> bool:
        return await self.backend.arun(lambda cache: delete_documents(cache, ids))

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents in the order of ``ids``; a split document as all of its chunks. The id of a
        chunk gives that chunk alone."""
        return self.backend.run(lambda cache: get_by_ids(cache, ids))

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return await self.backend.arun(lambda cache: get_by_ids(cache, ids))

    def similarity_search(
        self, query: str, k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        return [doc for doc, _ in self.similarity_search_with_score(query, k, filter)]

    async def asimilarity_search(
        self, query: str, k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        return [doc for doc, _ in await self.asimilarity_search_with_score(query, k, filter)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:
        """Documents and cosine similarities, the most similar first."""
        return self.backend.run(lambda cache: search_with_scores(cache, query, k, filter))

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:
        return await self.backend.arun(lambda cache: search_with_scores(cache, query, k, filter))

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        query = normalized(embedding)
        return self.backend.run(
            lambda cache: [d for d, _ in search_with_scores(cache, query, k, filter)]
        )

    async def asimilarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        query = normalized(embedding)
        return await self.backend.arun(
            lambda cache: [d for d, _ in search_with_scores(cache, query, k, filter)]
        )

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        """``k`` of the ``fetch_k`` most similar documents, by maximal marginal relevance: a
        ``lambda_mult`` of 0 prefers diverse documents, 1 those most similar to the query."""
        return self.backend.run(lambda c: search_mmr(c, query, k, fetch_k, lambda_mult, filter))

    async def amax_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        return await self.backend.arun(
            lambda c: search_mmr(c, query, k, fetch_k, lambda_mult, filter)
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        query = normalized(embedding)
        return self.backend.run(lambda c: search_mmr(c, query, k, fetch_k, lambda_mult, filter))

    async def amax_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        query = normalized(embedding)
        return await self.backend.arun(
            lambda c: search_mmr(c, query, k, fetch_k, lambda_mult, filter)
        )

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a vector store from the constructor's ``kwargs`` and add texts to it.

        The store has its own embedder: ``embedding`` must be None, or a vector store's embeddings.
        """
        if not (embedding is None or isinstance(embedding, StoreEmbeddings)):
            raise ConfigError(
                "a ragcache store has its own embedder: leave embedding out, or choose another "
                "sentence-transformers model in the settings (embedder)"
            )
        made = cls(**kwargs)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: (1 + cosine) / 2

    def _add(
        self, cache: RagCache, named: list[tuple[str, Document]], progress: StageProgress | None
    ) -> None:
        converted = [from_document(d, name, whole=not self.splitting) for name, d in named]
        for document in converted:
            if not document.text.strip():
                raise SourceError(f"{document.id} has no text: leave it out")
            if not self.splitting:
                _check_length(cache, document.id, document.text)
        cache.add(converted, progress=progress)


def _named(documents: Iterable[Document], ids: Sequence[str] | None) -> list[tuple[str, Document]]:
    listed = list(require_list(documents, "documents", Document))
    ids = None if ids is None else list(require_list(ids, "ids"))
    if ids is not None and len(ids) != len(listed):
        raise ConfigError(
            f"{len(listed)} documents but {len(ids)} ids: give one for each document, or none"
        )
    names = [document.id for document in listed] if ids is None else ids
    if "" in names:
        raise ConfigError("an id is empty: give a text, or None for a new id")
    return [
        (str(uuid.uuid4()) if name is None else name, document)
        for name, document in zip(names, listed, strict=True)
    ]


def _documents(texts: Iterable[str], metadatas: list[dict[str, Any]] | None) -> list[Document]:
    listed = list(require_list(texts, "texts", Document))
    if metadatas is None:
        return [Document(text) for text in listed]
    described = list(require_list(metadatas, "metadatas"))
    if len(described) != len(listed):
        raise ConfigError(
            f"{len(listed)} texts but {len(described)} metadatas: give one for each text, or none"
        )
    return [Document(text, metadata=one) for text, one in zip(listed, described, strict=True)]


def _check_length(cache: RagCache, name: str, text: str) -> None:
    tokens, limit = cache.indexing.splitter.count(text), cache.engine.context_tokens
    if tokens >= limit:  # other tokens precede it
        raise SourceError(
            f"{name} has {tokens} tokens, and a chunk must have less than the {limit} of the "
            "model's context: split it, or let the store split it (splitting=True)"
        )
