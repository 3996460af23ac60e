"""LangChain's retriever interface to a store or service."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from ragcache.langchain.backend import SearchRequest
from ragcache.langchain.connection import BackendConnection
from ragcache.retriever.metadata import Filter


class RagCacheRetriever(BackendConnection, BaseRetriever):
    """Retrieves the ``k`` chunks nearest to a question, as :meth:`RagCache.retrieve` does.

    It adds ``neighbours`` chunks before and after each of them from the same document, and keeps a
    document's chunks together and in order, so that text follows what it refers to. ``filter`` says
    what metadata the documents must have, see
    :class:`~ragcache.retriever.metadata.MetadataFilter`. All may be given to the constructor and to
    ``invoke``; None takes the settings of the store or service, and for ``filter`` all documents.
    ``store=`` or ``base_url=`` says which one, see :class:`BackendConnection`.
    """

    model_config = ConfigDict(extra="forbid")

    k: int | None = None
    neighbours: int | None = None
    filter: dict[str, Any] | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
        filter: Filter | None = None,
    ) -> list[Document]:
        return self.backend.search(self._request(query, k, neighbours, filter))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
        filter: Filter | None = None,
    ) -> list[Document]:
        backend = await self.aopen_backend()
        return await backend.asearch(self._request(query, k, neighbours, filter))

    def _request(
        self, query: str, k: int | None, neighbours: int | None, filter: Filter | None
    ) -> SearchRequest:
        """A request with a call's options, or else those of the constructor."""
        return SearchRequest(
            query,
            self.k if k is None else k,
            self.neighbours if neighbours is None else neighbours,
            self.filter if filter is None else filter,
        )
