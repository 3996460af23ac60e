"""The retriever that questions from the command line and the service go through."""

from __future__ import annotations

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from ragcache.langchain.connection import Place


class RagCacheRetriever(Place, BaseRetriever):
    """The ``k`` chunks of a store that are nearest to a question, as :meth:`RagCache.retrieve`.

    Of a document that was split, ``neighbours`` chunks before and after each of them come along,
    and its chunks stay together and in order: what one refers back to stands before it. Documents
    that are one chunk have no neighbours. Both may be given when it is made and when it is invoked;
    None takes the settings of the store or service. ``store=`` or ``base_url=`` says where, as
    :class:`Place` has them.
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
        return self.backend.search(query, *self._wanted(k, neighbours))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        neighbours: int | None = None,
    ) -> list[Document]:
        backend = await self.opened()
        return await backend.asearch(query, *self._wanted(k, neighbours))

    def _wanted(self, k: int | None, neighbours: int | None) -> tuple[int | None, int | None]:
        """What a call says before what was said when it was made."""
        return (
            self.k if k is None else k,
            self.neighbours if neighbours is None else neighbours,
        )
