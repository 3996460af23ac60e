"""Use your own model: a folder from ``save_pretrained``, a GGUF file or a name on a model hub.

The store records the model. KV cannot be shared between models: if the store is opened with another
one, every chunk is computed again. The model's tokenizer counts a prompt's tokens beforehand.

python -m examples.langchain.own_model --model FOLDER
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from examples.langchain.chain import QUESTION, TEXTS
from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages


def main(folder: str, model: str) -> None:
    store = RagCacheVectorStore(folder, model=model)
    store.add_texts(TEXTS, ids=["holt", "corvex"])
    chat = ChatRagCache(store=store, ratio=0.15, max_tokens=32, require_chunks=True)
    asked = rag_messages(QUESTION, store.similarity_search(QUESTION, k=2))
    print(chat.get_num_tokens_from_messages(asked), "tokens to be read")
    answer = chat.invoke(asked)
    print(answer.text.strip())
    report = answer.response_metadata["ragcache"]
    print(report["reused_tokens"], "of", report["chunk_tokens"], "tokens of chunks reused, by")
    print(answer.response_metadata["model_name"])


if __name__ == "__main__":
    options = ArgumentParser(description="A RAG chain over a model of your own.")
    options.add_argument("--model", required=True, help="its folder or GGUF file, or its name")
    options.add_argument("--store", default="", help="a folder; default: one named for the model")
    given = options.parse_args()
    main(given.store or f"langchain-store-{Path(given.model).resolve().name}", given.model)
