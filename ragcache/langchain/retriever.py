"""LangChain's retriever interface to a store or service."""

from __future__ import annotations

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from ragcache.langchain.connection import BackendConnection


class RagCacheRetriever(BackendConnection, BaseRetriever):
    """Retrieves the ``k`` chunks nearest to a question, as :meth:`RagCache.retrieve` does.

    It adds ``neighbours`` chunks before and after each of them from the same document, and keeps a
    document's chunks together and in order, so that text follows what it refers to. Both may be
    given to the constructor and to ``invoke``; None takes the settings of the store or service.
    ``store=`` or ``base_url=`` says which one, see :class:`BackendConnection`.
    """

    model_config = ConfigDict(extra="forbid")

    k: int | None = None
    neighbours: int | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        return self.backend.search(query, *self._options(k, neighbours))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        backend = await self.aopen_backend()
        return await backend.asearch(query, *self._options(k, neighbours))

    def _options(self, k: int | None, neighbours: int | None) -> tuple[int | None, int | None]:
        """A call's options, or else those of the constructor."""
        return (
            self.k if k is None else k,
            self.neighbours if neighbours is None else neighbours,
        )
