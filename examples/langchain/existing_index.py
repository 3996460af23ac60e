"""Use an existing FAISS index: any retriever works.

Chunks that are not in the store are computed with the first question over them, and stored.

python -m examples.langchain.existing_index
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from examples.langchain.chain import QUESTION, TEXTS
from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages


class FaissRetriever(BaseRetriever):
    """An existing index with its documents and embedding model."""

    index: Any
    documents: list[Document]
    embeddings: Embeddings
    k: int = 2

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        vector = np.array([self.embeddings.embed_query(query)], np.float32)
        _, rows = self.index.search(vector, self.k)
        return [self.documents[row] for row in rows[0]]


def main(folder: str) -> None:
    embeddings = RagCacheVectorStore(folder).embeddings  # stands for any embedding model
    vectors = np.array(embeddings.embed_documents(TEXTS), np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    retriever = FaissRetriever(
        index=index, documents=[Document(text) for text in TEXTS], embeddings=embeddings
    )
    model = ChatRagCache(store=folder)
    for _ in range(2):
        answer = model.invoke(rag_messages(QUESTION, retriever.invoke(QUESTION)))
        chunks = answer.response_metadata["ragcache"]["chunks"]
        print(answer.text.strip(), [chunk["miss"] or "stored" for chunk in chunks])


if __name__ == "__main__":
    main("langchain-store")
