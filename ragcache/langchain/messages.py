"""Messages in and out: a question over documents, and answers that show what they reused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage

from ragcache.errors import PromptError
from ragcache.langchain.chunk_parsing import NO_DOCUMENTS
from ragcache.langchain.heat import heat_map
from ragcache.util.list_argument import require_list


def rag_messages(
    question: str | Mapping[str, Any], documents: Iterable[Document | str] | None = None
) -> list[BaseMessage]:
    """A question over documents: one human message, with a ``text-plain`` block for each document.

    A block has its document's text, id and, as ``title``, that of its metadata. A list of documents
    that is empty is kept too: nothing else is then looked for. In a chain the question comes as a
    mapping with ``question`` and ``documents``; its ``history``, messages of earlier turns, goes
    before. Raises PromptError where it has no question, and ConfigError for documents that are no
    list, such as texts that were joined.

    >>> rag_messages("Where?", [Document("In Oslo.", id="holt")])[0].content[0]["text"]
    'In Oslo.'
    """
    history: Sequence[BaseMessage] = ()
    if isinstance(question, Mapping):
        given = question
        question = given.get("question", "")
        if "documents" in given:
            documents = require_list(given["documents"], "documents", Document)
        history = given.get("history", ())
    if not isinstance(question, str) or not question.strip():
        raise PromptError('there is no question: give a string, or a mapping with "question"')
    blocks: list[str | dict[str, Any]] = []
    if documents is not None:
        blocks += map(_block, require_list(documents, "documents", Document))
    nothing = {NO_DOCUMENTS: True} if documents is not None and not blocks else {}
    asked: list[str | dict[str, Any]] = [*blocks, {"type": "text", "text": question}]
    return [*history, HumanMessage(asked, additional_kwargs=nothing)]


def _block(document: Document | str) -> dict[str, Any]:
    block = {"type": "text-plain", "mime_type": "text/plain"}
    if isinstance(document, str):
        return {**block, "text": document}
    named = {"id": document.id, "title": document.metadata.get("title")}
    return {
        **block,
        "text": document.page_content,
        **{key: value for key, value in named.items() if isinstance(value, str)},
    }


class _Shown:
    """Drawn in a notebook: the text, and what was reused of every chunk."""

    content: Any
    response_metadata: dict[str, Any]

    def _repr_html_(self) -> str | None:
        report = self.response_metadata.get("ragcache")
        return heat_map(str(self.text), report) if report else None  # type: ignore[attr-defined]


class RagCacheMessage(_Shown, AIMessage):
    """An answer. Saved and loaded it is an AIMessage: all it adds is how it is shown."""

    @classmethod
    def lc_id(cls) -> list[str]:
        return AIMessage.lc_id()


class RagCacheMessageChunk(_Shown, AIMessageChunk):
    """A piece of an answer; their sum is shown as the whole is."""

    @classmethod
    def lc_id(cls) -> list[str]:
        return AIMessageChunk.lc_id()
