"""LangChain components of ragcache: a chat model, a vector store, a retriever, and message helpers.

::

    RagCacheVectorStore ─┐
    RagCacheRetriever   ─┼─ Documents ─ rag_messages() ─ messages ─ ChatRagCache ─ answer, report
    any other retriever ─┘              one content block per chunk

Needs ``pip install "ragcache-fusion[langchain]"``. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "ChatRagCache",
    "RagCacheMessage",
    "RagCacheMessageChunk",
    "RagCacheRetriever",
    "RagCacheVectorStore",
    "from_documents",
    "rag_messages",
]

if TYPE_CHECKING:
    from ragcache.langchain.chat import ChatRagCache as ChatRagCache
    from ragcache.langchain.documents import from_documents as from_documents
    from ragcache.langchain.messages import RagCacheMessage as RagCacheMessage
    from ragcache.langchain.messages import RagCacheMessageChunk as RagCacheMessageChunk
    from ragcache.langchain.messages import rag_messages as rag_messages
    from ragcache.langchain.retriever import RagCacheRetriever as RagCacheRetriever
    from ragcache.langchain.vectorstore import RagCacheVectorStore as RagCacheVectorStore
else:  # type checkers must not see __getattr__: with it, they would accept any name
    _HOME = {
        "ChatRagCache": "chat",
        "RagCacheMessage": "messages",
        "RagCacheMessageChunk": "messages",
        "RagCacheRetriever": "retriever",
        "RagCacheVectorStore": "vectorstore",
        "from_documents": "documents",
        "rag_messages": "messages",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name not in {"langchain_core", "httpx"}:
                raise
            raise ImportError(
                f"{error.name} is not installed, which {name} needs. "
                'Run `pip install "ragcache-fusion[langchain]"`.'
            ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
