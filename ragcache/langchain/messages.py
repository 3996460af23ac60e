"""Messages: a question with its documents, and answers that show in notebooks what they reused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage

from ragcache.errors import PromptError
from ragcache.langchain.convert import NO_DOCUMENTS
from ragcache.langchain.notebook_html import report_html
from ragcache.util.list_argument import require_list


def rag_messages(
    question: str | Mapping[str, Any], documents: Iterable[Document | str] | None = None
) -> list[BaseMessage]:
    """A question with documents: one human message with a ``text-plain`` block for each document.

    A block has its document's text and id, and as ``title`` the one in its metadata; of equal
    texts, the first is used. An empty list of documents is recorded in the message, for the report.
    In a chain the question may be a mapping with ``question`` and ``documents``; the messages in
    its ``history`` go before. Raises PromptError if there is no question, and ConfigError for
    documents that are not a list, such as one joined text.

    >>> rag_messages("Where?", [Document("In Oslo.", id="holt")])[0].content[0]["text"]
    'In Oslo.'
    """
    history: Sequence[BaseMessage] = ()
    if isinstance(question, Mapping):
        inputs = question
        question = inputs.get("question", "")
        if "documents" in inputs:
            documents = require_list(inputs["documents"], "documents", Document)
        history = inputs.get("history", ())
    if not isinstance(question, str) or not question.strip():
        raise PromptError('there is no question: give a string, or a mapping with "question"')
    blocks: list[str | dict[str, Any]] = []
    if documents is not None:
        blocks += map(_block, _unique(require_list(documents, "documents", Document)))
    marker = {NO_DOCUMENTS: True} if documents is not None and not blocks else {}
    content: list[str | dict[str, Any]] = [*blocks, {"type": "text", "text": question}]
    return [*history, HumanMessage(content, additional_kwargs=marker)]


def _unique(documents: Iterable[Document | str]) -> list[Document | str]:
    """The documents, each text at its first place."""
    first: dict[str, Document | str] = {}
    for document in documents:
        text = document if isinstance(document, str) else document.page_content
        first.setdefault(text.strip(), document)
    return list(first.values())


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


class _NotebookDisplay:
    """Shown in a notebook as its text and its report."""

    content: Any
    response_metadata: dict[str, Any]

    def _repr_html_(self) -> str | None:
        report = self.response_metadata.get("ragcache")
        return report_html(str(self.text), report) if report else None  # type: ignore[attr-defined]


class RagCacheMessage(_NotebookDisplay, AIMessage):
    """An answer. It is serialized as an AIMessage, since it only adds the display in notebooks."""

    @classmethod
    def lc_id(cls) -> list[str]:
        return AIMessage.lc_id()


class RagCacheMessageChunk(_NotebookDisplay, AIMessageChunk):
    """A piece of an answer; the sum of all pieces is displayed like the whole answer."""

    @classmethod
    def lc_id(cls) -> list[str]:
        return AIMessageChunk.lc_id()
