"""Migrate from ChatHuggingFace: replace the model, and keep documents separate.

Before::

    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    pipeline = HuggingFacePipeline.from_model_id("Qwen/Qwen2.5-0.5B-Instruct", "text-generation")
    model = ChatHuggingFace(llm=pipeline)
    prompt = ChatPromptTemplate.from_template("{context}\\n\\nQuestion: {question}")
    chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model

An unchanged chain works with ``ChatRagCache(store=..., model=...)`` in place of the model: texts of
known chunks are found in the prompt, and the report says so. It is better to mark where chunks
begin, as the second chain does.

python -m examples.langchain.migrate
"""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from examples.langchain.chain import QUESTION, TEXTS
from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages


def join(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def main(folder: str) -> None:
    store = RagCacheVectorStore(folder)
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
