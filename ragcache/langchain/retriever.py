"""The retriever that questions from the command line and the service go through."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field, PrivateAttr

from ragcache.langchain.documents import as_document
from ragcache.langchain.local import Local
from ragcache.pipeline import RagCache
from ragcache.settings import Settings


class RagCacheRetriever(BaseRetriever):
    """The ``k`` chunks of a store that are nearest to a question, as :meth:`RagCache.retrieve`.

    Of a document that was split, ``neighbours`` chunks before and after each of them come along,
    and its chunks stay together and in order: what one refers back to stands before it. Documents
    that are one chunk have no neighbours. Both may be given when it is made and when it is invoked;
    None takes the store's settings. ``store`` and ``settings`` as for :class:`ChatRagCache`.
    """

    store: Any
    model: str = ""
    settings: Settings | None = Field(default=None, exclude=True)
    k: int | None = None
    neighbours: int | None = None

    _local: Local | None = PrivateAttr(default=None)

    @property
    def local(self) -> Local:
        """The store, opened when it is first asked for."""
        if self._local is None:
            self._local = Local.of(self.store, self.model, self.settings)
        return self._local

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        return self.local.do(lambda cache: self._found(cache, query, k, neighbours))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        return await self.local.ado(lambda cache: self._found(cache, query, k, neighbours))

    def _found(
        self, cache: RagCache, query: str, k: int | None, neighbours: int | None
    ) -> list[Document]:
        k = self.k if k is None else k
        neighbours = self.neighbours if neighbours is None else neighbours
        passages = cache.retrieve(query, k, neighbours)
        return [as_document(cache.catalog, passage.chunk) for passage in passages]
