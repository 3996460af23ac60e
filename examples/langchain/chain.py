"""A RAG chain in ten lines, which reuses the KV of its documents.

python -m examples.langchain.chain
"""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages

TEXTS = [
    "Mira Holt works as a painter.\n\nShe lives in Oslo.",
    "Corvex Mills makes clocks. The company is based in Bexley.",
]
QUESTION = "What does Corvex Mills make?"


def build(folder: str) -> Runnable[str, Any]:
    """The chain, with the texts in a store in ``folder``."""
    store = RagCacheVectorStore(folder)
    store.add_texts(TEXTS, ids=["holt", "corvex"])
    return (
        {"documents": store.as_retriever(), "question": RunnablePassthrough()}
        | RunnableLambda(rag_messages)
        | ChatRagCache(store=store)
    )


if __name__ == "__main__":
    answer = build("langchain-store").invoke(QUESTION)
    print(answer.text)
    report = answer.response_metadata["ragcache"]
    print(report["reused_tokens"], "of", report["chunk_tokens"], "tokens reused")
