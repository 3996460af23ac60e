"""Finds the chunks and the question in a list of messages.

Chunks are, in this order, the ``text-plain`` content blocks of all messages, all but the last of
several text parts of the last human message, the artifacts of tool messages, and the documents that
are passed beside the messages. A text that occurs repeatedly is one chunk, at its first place. An
empty list of documents means that there are no chunks. Only if none of these sources is present,
the texts of known chunks are searched for in the messages, and removed from them.
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
from ragcache.retriever.known_texts import KnownTexts
from ragcache.util.list_argument import require_list

#: The sources of chunks, as reports name them in ``boundaries``.
BLOCKS, PARTS, ARTIFACTS = "content blocks", "text parts", "tool artifacts"
DOCUMENTS, MATCHED = "documents", "matched text"

#: Content blocks of a model's messages that are no part of its text.
_SKIPPED_BLOCKS = {
    "reasoning",
    "thinking",
    "redacted_thinking",
    "tool_call",
    "tool_use",
    "tool_call_chunk",
}
#: Key in the ``additional_kwargs`` of a question that :func:`rag_messages` made without documents.
NO_DOCUMENTS = "ragcache_no_documents"


@dataclass(frozen=True, slots=True)
class InputChunk:
    """A chunk of the messages or documents. ``id``: the caller's, if it has one."""

    text: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ContextMessage:
    """The text of an instruction, an earlier turn or a tool result. ``role`` is empty for
    instructions."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class ParsedMessages:
    """A question, its chunks, and the other messages."""

    question: str
    context: tuple[ContextMessage, ...]  # instructions, earlier turns and tool results, in order
    chunks: tuple[InputChunk, ...]
    sources: tuple[str, ...]  # of the chunks, or of the information that there are none
    blank: int = 0  # chunks without text, which are left out

    @property
    def text(self) -> str:
        """The other messages' texts, one per line, and then the question.

        Lines begin with the role, ``User:``, ``Assistant:`` or ``Tool:``, and the name if a message
        has one; instructions have no role. Raises PromptError if there is no question.
        """
        if not self.question.strip():
            raise PromptError(
                "there is no question: end with a human message that has text besides chunks"
            )
        return self.text_or_blank

    @property
    def text_or_blank(self) -> str:
        """The same for messages that may have no question."""
        lines = [f"{m.role}: {m.text}" if m.role else m.text for m in self.context]
        return "\n\n".join(filter(None, ("\n".join(lines), self.question)))

    def match_known(self, known: KnownTexts) -> ParsedMessages:
        """Take known chunks out of the texts that contain them."""
        found: list[InputChunk] = []
        context = []
        for message in self.context:
            rest, chunks = _cut_known(message.text, known)
            found += chunks
            if rest:
                context.append(replace(message, text=rest))
        question, chunks = _cut_known(self.question, known)
        found += chunks
        if not found:
            return self
        return ParsedMessages(question, tuple(context), tuple(_unique(found)), (MATCHED,))


def _cut_known(text: str, known: KnownTexts) -> tuple[str, list[InputChunk]]:
    """Take known chunks out of a text: the rest of the text, and the chunks."""
    found: list[InputChunk] = []
    left: list[str] = []
    at = 0
    for start, end, id in known.find(text):
        found.append(InputChunk(text[start:end], id or None))
        left.append(text[at:start])
        at = end
    if not found:
        return text, found
    rest = "".join((*left, text[at:]))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", rest).strip(), found


def parse_messages(
    messages: Sequence[BaseMessage], documents: Iterable[Any] | None = None
) -> ParsedMessages:
    """Parse messages: the last human message is the question, and the others become its context.

    A ``text-plain`` block's id is its chunk's id; its title and context are not shown to the model.
    If the artifact of a tool message is a list of documents, these are used in place of the
    message's content; the tool call is dropped. ``documents`` may be None, which means that none
    were passed. Raises PromptError for content of another type, such as an image, and ConfigError
    for a single document that is not in a list.
    """
    last = max((n for n, m in enumerate(messages) if isinstance(m, HumanMessage)), default=None)
    chunks: list[InputChunk] = []
    sources: list[str] = []
    context: list[ContextMessage] = []
    question = ""
    for number, message in enumerate(messages):
        blocks, texts = _content(message)
        chunks += blocks
        sources += [BLOCKS] * bool(blocks)
        if number == last:
            sources += [BLOCKS] * (NO_DOCUMENTS in message.additional_kwargs)
            if len(texts) > 1 and not blocks:
                chunks += map(InputChunk, texts[:-1])
                sources.append(PARTS)
                texts = texts[-1:]
            question = "\n".join(texts)
            if message.name:
                question = f"{message.name}: {question}"
            continue
        if isinstance(message, ToolMessage):
            found = _documents(message.artifact)
            empty = message.artifact == [] and not texts
            sources += [ARTIFACTS] * bool(found or empty)
            if found:
                chunks += found
                continue
        if text := "\n".join(texts).strip():
            context.append(ContextMessage(_role(message), text))
    if documents is not None:
        chunks += map(_input_chunk, require_list(documents, "documents", Document))
        sources.append(DOCUMENTS)
    blank = sum(not chunk.text.strip() for chunk in chunks)
    return ParsedMessages(
        question, tuple(context), tuple(_unique(chunks)), tuple(dict.fromkeys(sources)), blank
    )


def _content(message: BaseMessage) -> tuple[list[InputChunk], list[str]]:
    """The chunks and the texts of one message."""
    if isinstance(message.content, str):
        return [], [message.content] if message.content.strip() else []
    chunks: list[InputChunk] = []
    texts: list[str] = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str) or kind == "text":
            text = block if isinstance(block, str) else str(block.get("text", ""))
            texts += [text] if text.strip() else []
        elif kind == "text-plain":
            chunks.append(_text_plain(block))
        elif not (isinstance(message, AIMessage) and kind in _SKIPPED_BLOCKS):
            raise PromptError(
                f"a message has content of type {kind!r}, which this model cannot read: give it "
                "text, and chunks as text-plain blocks"
            )
    return chunks, texts


def _text_plain(block: Mapping[str, Any]) -> InputChunk:
    text = block.get("text")
    if text is None and "base64" in block:
        try:
            text = base64.b64decode(block["base64"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise PromptError(
                f"a text-plain block's base64 is not text: {error}. Encode UTF-8, or give text."
            ) from error
    if not isinstance(text, str):
        raise PromptError(
            "a text-plain block has no text: give text or base64, since URLs and files are not read"
        )
    return InputChunk(text, block.get("id"))


def _documents(artifact: Any) -> list[InputChunk]:
    """The documents of a retriever tool's artifact; empty if it is something else."""
    if not isinstance(artifact, (list, tuple)):
        return []
    documents = [entry for entry in artifact if _is_document(entry)]
    return list(map(_input_chunk, documents)) if len(documents) == len(artifact) else []


def _is_document(entry: Any) -> bool:
    # A document that was saved and loaded, as in checkpoints of agents, may be a dictionary.
    return isinstance(entry, Document) or (isinstance(entry, Mapping) and "page_content" in entry)


def _input_chunk(document: Any) -> InputChunk:
    if isinstance(document, str):
        return InputChunk(document)
    if isinstance(document, Document):
        return InputChunk(document.page_content, document.id)
    if isinstance(document, Mapping):
        text = document.get("text", document.get("page_content"))
        if isinstance(text, str):
            return InputChunk(text, document.get("id"))
    raise PromptError(
        f"{type(document).__name__} is not a document: give Documents, strings, or "
        'dictionaries with "text" and "id"'
    )


def _unique(chunks: Iterable[InputChunk]) -> list[InputChunk]:
    """The chunks that have text, each text at its first place."""
    first: dict[str, InputChunk] = {}
    for chunk in chunks:
        if text := chunk.text.strip():
            first.setdefault(text, chunk)
    return list(first.values())


def _role(message: BaseMessage) -> str:
    if isinstance(message, SystemMessage):
        return ""
    kinds = {HumanMessage: "User", AIMessage: "Assistant", ToolMessage: "Tool"}
    role = next((name for kind, name in kinds.items() if isinstance(message, kind)), "")
    if isinstance(message, ChatMessage):
        role = message.role.capitalize()
    return " ".join(filter(None, (role or message.type.capitalize(), message.name)))
