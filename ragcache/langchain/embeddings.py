"""A store's embedder as LangChain's Embeddings."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from ragcache.langchain.local_backend import LocalBackend
from ragcache.rag import RagCache
from ragcache.util.list_argument import require_list


class StoreEmbeddings(Embeddings):
    """The unit vectors that a store's index compares."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.backend.run(lambda cache: _embed(cache, texts))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self.backend.arun(lambda cache: _embed(cache, texts))

    def embed_query(self, text: str) -> list[float]:
        return self.backend.run(lambda cache: _embed_query(cache, text))

    async def aembed_query(self, text: str) -> list[float]:
        return await self.backend.arun(lambda cache: _embed_query(cache, text))


def _embed(cache: RagCache, texts: list[str]) -> list[list[float]]:
    embedder = cache.retriever.embedder
    vectors: list[list[float]] = embedder.embed(list(require_list(texts, "texts"))).tolist()
    return vectors


def _embed_query(cache: RagCache, text: str) -> list[float]:
    vector: list[float] = cache.retriever.embed_question(text).tolist()
    return vector
