"""Migrate from ChatHuggingFace: replace the model, and keep documents separate.

Before::

    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    pipeline = HuggingFacePipeline.from_model_id("Qwen/Qwen2.5-0.5B-Instruct", "text-generation")
    model = ChatHuggingFace(llm=pipeline)
    prompt = ChatPromptTemplate.from_template("{context}\\n\\nQuestion: {question}")
    chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model

An unchanged chain works with ``ChatRagCache(store=..., model=...)`` in place of the model: the
texts of stored chunks are found where they stand in the messages, and their KV is reused. By
default, only texts of 1,000 characters and more are searched; the setting ``find_chars`` changes
that. Documents that are marked as chunks, as in the second chain, are reused at any length.

python -m examples.langchain.migrate
"""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from examples.langchain.chain import QUESTION, TEXTS
from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages
from ragcache.settings import Settings


def join(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def main(folder: str) -> None:
    store = RagCacheVectorStore(folder, settings=Settings.load(find_chars=100))
    store.add_texts(TEXTS, ids=["holt", "corvex"])
    retriever, model = store.as_retriever(), ChatRagCache(store=store)

    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    left_as_it_is = (
        {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model
    )
    better = (
        {"documents": retriever, "question": RunnablePassthrough()}
        | RunnableLambda(rag_messages)
        | model
    )
    for chain in (left_as_it_is, better):
        answer = chain.invoke(QUESTION)
        print(answer.text.strip(), answer.response_metadata["ragcache"]["boundaries"])


if __name__ == "__main__":
    main("langchain-store")
