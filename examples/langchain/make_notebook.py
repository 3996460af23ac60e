"""Write langchain.ipynb beside this file, with the outputs of its cells.

python -m examples.langchain.make_notebook
"""

from __future__ import annotations

from pathlib import Path

from examples.notebook import write

CELLS = [
    "# ragcache in LangChain\n\nDocuments in, answers out, and what was reused for them.",
    """\
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages

store = RagCacheVectorStore("notebook-store")
texts = [
    "Mira Holt works as a painter.\\n\\nShe lives in Oslo.",
    "Corvex Mills makes clocks. The company is based in Bexley.",
]
store.add_texts(texts, ids=["holt", "corvex"])""",
    "The KV of both documents is stored now. A chain of LCEL, and a question:",
    """\
chain = (
    {"documents": store.as_retriever(), "question": RunnablePassthrough()}
    | RunnableLambda(rag_messages)
    | ChatRagCache(store=store, ratio=0.15)
)
chain.invoke("What does Corvex Mills make?")""",
    "Green is what was taken from the store, red what was computed. Another method:",
    """\
reuse = ChatRagCache(store=store, mode="reuse")
documents = store.similarity_search("Where is Corvex Mills based?")
reuse.invoke(rag_messages("Where is Corvex Mills based?", documents))""",
    "A chunk that is not known is computed with its first question, and stored:",
    """\
baker = "Ansel Brook works as a baker. He lives in Bexley."
for _ in range(2):
    answer = reuse.invoke("Where does Ansel Brook live?", documents=[baker])
    (chunk,) = answer.response_metadata["ragcache"]["chunks"]
    print(answer.text.strip(), chunk["miss"] or "stored")""",
]


if __name__ == "__main__":
    write(CELLS, Path(__file__).resolve().with_name("langchain.ipynb"))
