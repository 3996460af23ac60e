"""Where chunks begin and end in a list of messages, and what is asked about them.

Chunks come, in this order, from ``text-plain`` content blocks of any message, from several text
parts of the last human message, from the artifacts of tool messages, and from documents that are
given beside the messages. The same text is taken once, where it comes first. A list of documents
that is empty says that there are none. Only where nothing says what the chunks are, texts of known
chunks are looked for in what was said, and taken out of it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from ragcache.errors import PromptError
from ragcache.util.list_argument import require_list

#: The ways by which boundaries come, as reports name them.
BLOCKS, PARTS, ARTIFACTS = "content blocks", "text parts", "tool artifacts"
DOCUMENTS, MATCHED = "documents", "matched text"

#: Blocks of a model's own messages that say how it came to its text, and no part of that.
_OWN = {"reasoning", "thinking", "redacted_thinking", "tool_call", "tool_use", "tool_call_chunk"}
#: In the ``additional_kwargs`` of a question that :func:`rag_messages` has made over no documents.
NO_DOCUMENTS = "ragcache_no_documents"
_HEAD = 16  # characters of a chunk that are looked up; shorter texts turn up by chance


@dataclass(frozen=True, slots=True)
class Given:
    """A chunk as it came. ``id``: what its giver calls it, if anything."""

    text: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """The text of one message. ``speaker`` is empty for instructions."""

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked, over which chunks, and what was said besides."""

    question: str
    besides: tuple[Said, ...]  # instructions, earlier turns, results of tools, in their order
    chunks: tuple[Given, ...]
    ways: tuple[str, ...]  # by which it was said what the chunks are, also that there are none
    blank: int = 0  # chunks that were given without text, and left out

    @property
    def text(self) -> str:
        """The question, behind a line for everything that was said besides.

        Instructions stand as they are, other lines begin with who said it: ``User:``,
        ``Assistant:``, ``Tool:``, followed by the name where a message has one. Raises PromptError
        where nothing is asked.
        """
        if not self.question.strip():
            raise PromptError(
                "there is no question: end with a human message that has text of its own"
            )
        return self.wording

    @property
    def wording(self) -> str:
        """The same of messages that may end without a question."""
        lines = [f"{s.speaker}: {s.text}" if s.speaker else s.text for s in self.besides]
        return "\n\n".join(filter(None, ("\n".join(lines), self.question)))

    def matched(self, known: KnownTexts) -> Turn:
        """With the known chunks that its texts contain taken out of them."""
        found: list[Given] = []
        besides = []
        for said in self.besides:
            rest, chunks = known.cut(said.text)
            found += chunks
            if rest:
                besides.append(replace(said, text=rest))
        question, chunks = known.cut(self.question)
        found += chunks
        if not found:
            return self
        return Turn(question, tuple(besides), tuple(_once(found)), (MATCHED,))


class KnownTexts:
    """Texts of stored chunks, to be found in longer ones."""

    def __init__(self, chunks: Iterable[Given] = ()) -> None:
        self._by_head: dict[str, list[Given]] = {}
        for chunk in chunks:
            text = chunk.text.strip()
            if len(text) >= _HEAD:
                self._by_head.setdefault(text[:_HEAD], []).append(Given(text, chunk.id))
        for same in self._by_head.values():
            same.sort(key=lambda chunk: -len(chunk.text))

    def cut(self, text: str) -> tuple[str, list[Given]]:
        """What is left of a text, and the chunks that stand in it whole, the longest first where
        one begins as another does."""
        found: list[Given] = []
        left: list[str] = []
        at = kept = 0
        while at <= len(text) - _HEAD:
            here = self._by_head.get(text[at : at + _HEAD], ())
            chunk = next((c for c in here if text.startswith(c.text, at)), None)
            if chunk is None:
                at += 1
                continue
            found.append(chunk)
            left.append(text[kept:at])
            at = kept = at + len(chunk.text)
        if not found:
            return text, found
        rest = "".join((*left, text[kept:]))
        return re.sub(r"\s*\n\s*\n\s*", "\n\n", rest).strip(), found


def read(messages: Sequence[BaseMessage], documents: Iterable[Any] | None = None) -> Turn:
    """The last human message is the question; everything else that was said is kept beside it.

    A ``text-plain`` block's id is its chunk's; its title and context name it and are not shown to
    the model. A tool message with documents as its artifact stands for these, so its content is
    not repeated; nor is the call it answers. ``documents`` that are None were not given. Raises
    PromptError for content of another kind, such as an image, and ConfigError for one document
    that is in no list.
    """
    last = max((n for n, m in enumerate(messages) if isinstance(m, HumanMessage)), default=None)
    chunks: list[Given] = []
    ways: list[str] = []
    besides: list[Said] = []
    question = ""
    for number, message in enumerate(messages):
        blocks, texts = _content(message)
        chunks += blocks
        ways += [BLOCKS] * bool(blocks)
        if number == last:
            ways += [BLOCKS] * (NO_DOCUMENTS in message.additional_kwargs)
            if len(texts) > 1 and not blocks:
                chunks += map(Given, texts[:-1])
                ways.append(PARTS)
                texts = texts[-1:]
            question = "\n".join(texts)
            if message.name:
                question = f"{message.name}: {question}"
            continue
        if isinstance(message, ToolMessage):
            found = _documents(message.artifact)
            nothing_found = message.artifact == [] and not texts
            ways += [ARTIFACTS] * bool(found or nothing_found)
            if found:
                chunks += found
                continue
        if text := "\n".join(texts).strip():
            besides.append(Said(_speaker(message), text))
    if documents is not None:
        chunks += map(_given, require_list(documents, "documents", Document))
        ways.append(DOCUMENTS)
    blank = sum(not chunk.text.strip() for chunk in chunks)
    return Turn(question, tuple(besides), tuple(_once(chunks)), tuple(dict.fromkeys(ways)), blank)


def _content(message: BaseMessage) -> tuple[list[Given], list[str]]:
    """Chunks and texts of one message."""
    if isinstance(message.content, str):
        return [], [message.content] if message.content.strip() else []
    chunks: list[Given] = []
    texts: list[str] = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str) or kind == "text":
            text = block if isinstance(block, str) else str(block.get("text", ""))
            texts += [text] if text.strip() else []
        elif kind == "text-plain":
            chunks.append(_plain(block))
        elif not (isinstance(message, AIMessage) and kind in _OWN):
            raise PromptError(
                f"a message has content of type {kind!r}, which this model cannot read: give it "
                "text, and chunks as text-plain blocks"
            )
    return chunks, texts


def _plain(block: Mapping[str, Any]) -> Given:
    text = block.get("text")
    if text is None and "base64" in block:
        try:
            text = base64.b64decode(block["base64"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise PromptError(
                f"a text-plain block's base64 is no text: {error}. Encode UTF-8, or give text."
            ) from error
    if not isinstance(text, str):
        raise PromptError("a text-plain block has no text: nothing is fetched from URLs or files")
    return Given(text, block.get("id"))


def _documents(artifact: Any) -> list[Given]:
    """Those of a retriever tool's artifact; none where it is something else."""
    if not isinstance(artifact, (list, tuple)):
        return []
    documents = [entry for entry in artifact if _is_document(entry)]
    return list(map(_given, documents)) if len(documents) == len(artifact) else []


def _is_document(entry: Any) -> bool:
    # What was saved and loaded, as checkpoints of agents are, may have become a dictionary.
    return isinstance(entry, Document) or (isinstance(entry, Mapping) and "page_content" in entry)


def _given(document: Any) -> Given:
    if isinstance(document, str):
        return Given(document)
    if isinstance(document, Document):
        return Given(document.page_content, document.id)
    if isinstance(document, Mapping):
        text = document.get("text", document.get("page_content"))
        if isinstance(text, str):
            return Given(text, document.get("id"))
    raise PromptError(
        f"{type(document).__name__} is no document: give Documents, strings, or "
        'dictionaries with "text" and "id"'
    )


def _once(chunks: Iterable[Given]) -> list[Given]:
    """Those that have text, each text where it comes first."""
    first: dict[str, Given] = {}
    for chunk in chunks:
        if text := chunk.text.strip():
            first.setdefault(text, chunk)
    return list(first.values())


def _speaker(message: BaseMessage) -> str:
    if isinstance(message, SystemMessage):
        return ""
    kinds = {HumanMessage: "User", AIMessage: "Assistant", ToolMessage: "Tool"}
    speaker = next((name for kind, name in kinds.items() if isinstance(message, kind)), "")
    if isinstance(message, ChatMessage):
        speaker = message.role.capitalize()
    return " ".join(filter(None, (speaker or message.type.capitalize(), message.name)))
