"""A store's embedder, as LangChain asks for one."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from ragcache.langchain.local_backend import Local
from ragcache.rag import RagCache
from ragcache.util.list_argument import require_list


class StoreEmbeddings(Embeddings):
    """The vectors that a store compares, of length 1."""

    def __init__(self, local: Local) -> None:
        self.local = local

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.local.do(lambda cache: _embed(cache, texts))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self.local.ado(lambda cache: _embed(cache, texts))

    def embed_query(self, text: str) -> list[float]:
        return self.local.do(lambda cache: _question(cache, text))

    async def aembed_query(self, text: str) -> list[float]:
        return await self.local.ado(lambda cache: _question(cache, text))


def _embed(cache: RagCache, texts: list[str]) -> list[list[float]]:
    embedder = cache.retriever.embedder
    vectors: list[list[float]] = embedder.embed(list(require_list(texts, "texts"))).tolist()
    return vectors


def _question(cache: RagCache, text: str) -> list[float]:
    vector: list[float] = cache.retriever.embed_question(text).tolist()
    return vector
