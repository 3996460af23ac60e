"""Place documents in a chat, or give them to a chat template that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.jinja_source import parse_source
from ragcache.engine.template import SEPARATOR
from ragcache.errors import PromptError
from ragcache.types import Segment

__all__ = ["DocumentsIn"]

#: Where documents are placed by a template that does not read them: before the text of the last
#: user message, or at the end of the system message.
DocumentsIn = Literal["user", "system"]


def with_documents(
    messages: Sequence[ChatMessage], documents: Sequence[Segment], where: DocumentsIn
) -> list[ChatMessage]:
    """The messages with documents in them. Raises PromptError if there is no user message."""
    if where == "system":
        if messages[0].role != "system":
            return [ChatMessage("system", tuple(documents)), *messages]
        own = messages[0].content
        apart = () if not own or messages[0].text.endswith("\n") else (Segment(SEPARATOR),)
        return [replace(messages[0], content=(*own, *apart, *documents)), *messages[1:]]
    for index in reversed(range(len(messages))):
        if messages[index].role == "user":
            content = (*documents, *messages[index].content)
            changed = replace(messages[index], content=content)
            return [*messages[:index], changed, *messages[index + 1 :]]
    raise PromptError(
        f"{len(documents)} documents cannot be placed before the last user message, because none "
        f"of the {len(messages)} messages has the role user. Add one, or place the documents in "
        "the system message."
    )


def without_separator(document: Segment) -> Segment:
    """A document as templates take it, which separate documents themselves."""
    text = document.text.removesuffix(SEPARATOR)
    if text == document.text:
        return document
    return replace(document, text=text, stored=document.stored or document.text)


def as_variable(key: str, text: str, number: int, source: str) -> dict[str, Any]:
    """A document for a template: its text, and what else the template reads of it."""
    words = parse_source(source).words
    document: dict[str, Any] = {"title": ""} if "title" in words else {}
    if "doc_id" in words:
        document["doc_id"] = number
    return document | {key: text}
