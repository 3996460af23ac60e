"""The vector store: LangChain's documents, with their KV computed when they are added."""

# Unlike the methods they override, these take no options that they do not know.
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
from ragcache.langchain.local_backend import Local
from ragcache.langchain.search import Filter, diverse, named_so, remove, scored, unit
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import StageProgress
from ragcache.util.list_argument import require_list


class RagCacheVectorStore(VectorStore):
    """Documents, their vectors and their chunks' KV in one store of ragcache.

    ``store`` and ``settings`` as for :class:`ChatRagCache`; its embedder makes the vectors. A
    document is one chunk under its own id, for it has been split before, as a rule. With
    ``splitting`` the store splits it as ``ragcache index`` does: a document that makes several
    chunks has these found one by one, as ``id#0``, ``id#1``, ..., and is deleted as a whole.

    Scores are cosines, in [-1, 1]. A ``filter`` is a dictionary of metadata that must be equal, or
    a function that is asked about each document. Everything takes its turn with questions that are
    being answered from the same store; an ``a...`` method never blocks the event loop.
    """

    def __init__(
        self,
        store: str | Path | RagCache,
        *,
        model: str = "",
        settings: Settings | None = None,
        splitting: bool = False,
    ) -> None:
        self.local = Local.of(store, model, settings)
        self.splitting = splitting

    @property
    def embeddings(self) -> Embeddings:
        return StoreEmbeddings(self.local)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str] | None = None,
        progress: StageProgress | None = None,
    ) -> list[str]:
        """:meth:`add_documents` of texts, each with its metadata. ConfigError unless there are as
        many of them as texts."""
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
        """Embed and store documents and compute their chunks' KV; their ids.

        Ids are ``ids``, else the documents' own, else new ones. An id that is there is replaced. A
        document that is there unchanged costs nothing. ``progress`` is told, on the store's thread,
        what is being done, how much of it is done, and how much there is. ``batch_size`` is what
        LangChain's indexing says of a list that it has cut already. Raises SourceError for blank,
        overlong, or doubly named documents, ConfigError where ids or documents are no lists, or not
        as many, and then adds none.
        """
        named = _named(documents, ids)
        self.local.do(lambda cache: self._add(cache, named, progress))
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
        await self.local.ado(lambda cache: self._add(cache, named, progress))
        return [name for name, _ in named]

    def delete(self, ids: list[str] | None = None) -> bool:
        """Delete documents, and KV that no other one uses; None: all of them. Ids that are not
        there are passed over. ConfigError for the id of a chunk of a document that was split."""
        return self.local.do(lambda cache: remove(cache, ids))

    async def adelete(self, ids: list[str] | None = None) -> bool:
        return await self.local.ado(lambda cache: remove(cache, ids))

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents in the order of their ids; one that was split as all of its chunks. The id of
        such a chunk gives just that."""
        return self.local.do(lambda cache: named_so(cache, ids))

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return await self.local.ado(lambda cache: named_so(cache, ids))

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
        """Documents and cosines, the most similar first."""
        return self.local.do(lambda cache: scored(cache, query, k, filter))

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:
        return await self.local.ado(lambda cache: scored(cache, query, k, filter))

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        query = unit(embedding)
        return self.local.do(lambda cache: [d for d, _ in scored(cache, query, k, filter)])

    async def asimilarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None
    ) -> list[Document]:
        query = unit(embedding)
        return await self.local.ado(lambda cache: [d for d, _ in scored(cache, query, k, filter)])

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        """Of the ``fetch_k`` most similar documents, ``k`` that are also unlike each other: 0 of
        ``lambda_mult`` looks for the most unlike, 1 for the most similar to the query."""
        return self.local.do(lambda c: diverse(c, query, k, fetch_k, lambda_mult, filter))

    async def amax_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        return await self.local.ado(lambda c: diverse(c, query, k, fetch_k, lambda_mult, filter))

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        query = unit(embedding)
        return self.local.do(lambda c: diverse(c, query, k, fetch_k, lambda_mult, filter))

    async def amax_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
    ) -> list[Document]:
        query = unit(embedding)
        return await self.local.ado(lambda c: diverse(c, query, k, fetch_k, lambda_mult, filter))

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
        """A store, of which ``kwargs`` say where it is, with these texts in it.

        A store makes its own vectors: ``embedding`` must be None, or that of such a store.
        """
        if not (embedding is None or isinstance(embedding, StoreEmbeddings)):
            raise ConfigError(
                "a store of ragcache makes its own vectors: leave embedding out, and name another "
                "sentence-transformers model in settings (embedder)"
            )
        made = cls(**kwargs)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: (1 + cosine) / 2

    def _add(
        self, cache: RagCache, named: list[tuple[str, Document]], progress: StageProgress | None
    ) -> None:
        ours = [from_document(d, name, whole=not self.splitting) for name, d in named]
        for document in ours:
            if not document.text.strip():
                raise SourceError(f"{document.id} has no text: leave it out")
            if not self.splitting:
                _check_length(cache, document.id, document.text)
        cache.add(ours, progress=progress)


def _named(documents: Iterable[Document], ids: Sequence[str] | None) -> list[tuple[str, Document]]:
    given = list(require_list(documents, "documents", Document))
    ids = None if ids is None else list(require_list(ids, "ids"))
    if ids is not None and len(ids) != len(given):
        raise ConfigError(f"{len(given)} documents but {len(ids)} ids: give each one, or none")
    own = [document.id for document in given] if ids is None else ids
    if "" in own:
        raise ConfigError("an id is empty: give it a name, or None for a new one")
    return [
        (str(uuid.uuid4()) if name is None else name, document)
        for name, document in zip(own, given, strict=True)
    ]


def _documents(texts: Iterable[str], metadatas: list[dict[str, Any]] | None) -> list[Document]:
    given = list(require_list(texts, "texts", Document))
    if metadatas is None:
        return [Document(text) for text in given]
    described = list(require_list(metadatas, "metadatas"))
    if len(described) != len(given):
        raise ConfigError(
            f"{len(given)} texts but {len(described)} metadatas: give each one, or none"
        )
    return [Document(text, metadata=one) for text, one in zip(given, described, strict=True)]


def _check_length(cache: RagCache, name: str, text: str) -> None:
    tokens, most = cache.indexing.splitter.count(text), cache.engine.context_tokens
    if tokens > most:
        raise SourceError(
            f"{name} is {tokens} tokens, more than the {most} that the model reads: split it, or "
            "let the store do so (splitting=True)"
        )
