"""Writes langchain.ipynb beside this file, with the outputs of really running its cells.

python -m examples.langchain.make_notebook
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

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


def run(code: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs that a notebook shows of one cell."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(text)})
    if value is not None:
        data = {"text/plain": lines(repr(getattr(value, "text", value)))}
        if html := getattr(value, "_repr_html_", lambda: None)():
            data["text/html"] = lines(html)
        result = {"output_type": "execute_result", "execution_count": number}
        outputs.append({**result, "metadata": {}, "data": data})
    return outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def notebook() -> dict[str, Any]:
    """The whole notebook, run in the working directory."""
    names: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    for n, source in enumerate(CELLS):
        cell = {"id": f"cell-{n}", "metadata": {}, "source": lines(source)}
        if n % 2 == 0:
            cells.append({"cell_type": "markdown", **cell})
        else:
            outputs = run(source, names, n // 2 + 1)
            code = {"cell_type": "code", "execution_count": n // 2 + 1, "outputs": outputs}
            cells.append({**code, **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    target = Path(__file__).resolve().with_name("langchain.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = notebook()
        os.chdir(target.parent)
    target.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
