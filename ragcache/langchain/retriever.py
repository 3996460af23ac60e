"""LangChain's retriever interface to a store or service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from ragcache.core.request import RetrieveOptions
from ragcache.langchain.backend import SearchRequest
from ragcache.langchain.connection import BackendConnection
from ragcache.retriever.search_options import Retrieval
from ragcache.util.option_names import check_options

_OPTIONS = ("k", *(name for name in RetrieveOptions.__annotations__ if name != "top_k"))


class RagCacheRetriever(BackendConnection, BaseRetriever):
    """Retrieves the ``k`` chunks nearest to a question, as :meth:`RagCache.retrieve` does.

    It adds ``neighbours`` chunks before and after each of them from the same document, and keeps a
    document's chunks together and in order, so that text follows what it refers to. The other
    options are those of :class:`~ragcache.retriever.search_options.SearchOptions`. All may be given
    to the constructor and to ``invoke``; None takes the settings of the store or service, and for
    ``filter`` all documents.
    ``store=`` or ``base_url=`` says which one, see :class:`BackendConnection`.
    """

    model_config = ConfigDict(extra="forbid")

    k: int | None = None
    neighbours: int | None = None
    retrieval: Retrieval | None = None
    min_score: float | None = None
    mmr: float | None = None
    rerank: int | None = None
    top_tokens: int | None = None
    filter: dict[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        return self.backend.search(self._request(query, options))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        backend = await self.aopen_backend()
        return await backend.asearch(self._request(query, options))

    def _request(self, query: str, options: Mapping[str, Any]) -> SearchRequest:
        """A request with a call's options, or else those of the constructor."""
        check_options(options, _OPTIONS, "a retriever")
        chosen: dict[str, Any] = {
            name: getattr(self, name) if options.get(name) is None else options[name]
            for name in _OPTIONS
        }
        return SearchRequest(query, cast(RetrieveOptions, {"top_k": chosen.pop("k"), **chosen}))
