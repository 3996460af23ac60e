"""Converts LangChain's messages to those of OpenAI's API, with chunks where they stand.

Chunks are ``text-plain`` content blocks, all but the last of several text blocks of a human
message, the documents in the artifacts of tool messages, and the documents that are passed beside
the messages. In a converted message, a chunk is a part ``{"type": "chunk", "text", "id"}``, see
:class:`ragcache.core.prompting.PromptBuilder`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    convert_to_openai_messages,
)

from ragcache.errors import PromptError
from ragcache.util.list_argument import require_list

#: The sources of chunks, as reports name them in ``boundaries``. Those of the last are found by
#: RagCache in the messages' texts.
BLOCKS, TEXTS, ARTIFACTS = "content blocks", "text parts", "tool artifacts"
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
#: The end of an id of a split document's chunk.
_ORDINAL = re.compile(r".#\d+$").search
#: Key in the ``additional_kwargs`` of a question that :func:`rag_messages` made without documents.
NO_DOCUMENTS = "ragcache_no_documents"


@dataclass(frozen=True, slots=True)
class InputChunk:
    """A chunk of the messages or documents. ``id``: the caller's, if it has one."""

    text: str
    id: str | None = None

    @property
    def part(self) -> dict[str, Any]:
        """The part of a message's content."""
        part = {"type": "chunk", "text": self.text}
        return part if self.id is None else {**part, "id": self.id}


@dataclass(frozen=True, slots=True)
class ConvertedMessages:
    """Messages as in OpenAI's API, and the documents beside them."""

    messages: tuple[Mapping[str, Any], ...]
    documents: tuple[InputChunk, ...]
    chunks: int  # in the messages and documents
    sources: tuple[str, ...]  # of the chunks, or of the information that there are none
    blank: int  # chunks without text, which are left out

    def ids(self) -> dict[str, str]:
        """The callers' ids of chunks by their ids in RagCache's reports, where these differ."""
        parts = (part for message in self.messages for part in _parts(message["content"]))
        ids = {f"{id}#0": id for part in parts if (id := part.get("id")) and not _ORDINAL(id)}
        return ids | {f"{one.id}#{n}": one.id for n, one in enumerate(self.documents) if one.id}


def convert_messages(
    messages: Sequence[BaseMessage], documents: Iterable[Any] | None = None
) -> ConvertedMessages:
    """Convert messages, in their order. No text is changed or left out, except a model's reasoning.

    A ``text-plain`` block's id is its chunk's id; its title and context are not shown to the model.
    If the artifact of a tool message is a list of documents, these are used in place of the
    message's content. ``documents`` may be None, which means that none were passed; of equal texts
    among them, or in an artifact, the first is used. Raises PromptError for content of another
    type, such as an image, and ConfigError for a single document that is not in a list.
    """
    converted = [_Converted(message) for message in messages]
    sources = [one.source for one in converted if one.source]
    chunks = [chunk for one in converted for chunk in one.chunks]
    beside: list[InputChunk] = []
    if documents is not None:
        beside = list(map(_input_chunk, require_list(documents, "documents", Document)))
        sources.append(DOCUMENTS)
    blank = sum(not chunk.text.strip() for chunk in (*chunks, *beside))
    beside = _unique(beside)
    return ConvertedMessages(
        tuple(one.message for one in converted),
        tuple(beside),
        sum(bool(chunk.text.strip()) for chunk in chunks) + len(beside),
        tuple(dict.fromkeys(sources)),
        blank,
    )


class _Converted:
    """One message: as in OpenAI's API, its chunks, and their source."""

    def __init__(self, message: BaseMessage) -> None:
        texts = _texts(message)
        self.chunks = [text for text in texts if isinstance(text, InputChunk)]
        self.source = BLOCKS if self.chunks or NO_DOCUMENTS in message.additional_kwargs else ""
        if isinstance(message, ToolMessage):
            found = _documents(message.artifact)
            if found or (message.artifact == [] and not texts):
                texts = self.chunks = _unique(found)  # type: ignore[assignment]
                self.source = ARTIFACTS
        plain = [text for text in texts if isinstance(text, str)]
        marked = any(chunk.text.strip() for chunk in self.chunks)
        if isinstance(message, HumanMessage) and len(plain) > 1 and not marked:
            self.chunks += map(InputChunk, plain[:-1])
            self.source = TEXTS
        self.message = {**_fields(message), "content": _content(texts)}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [] if isinstance(content, str) else content


def _content(texts: Sequence[str | InputChunk]) -> str | list[dict[str, Any]]:
    """The content of these texts and chunks; blank ones of several are left out."""
    if not texts:
        return ""
    if len(texts) == 1 and isinstance(texts[0], str):
        return texts[0]
    return [
        text.part if isinstance(text, InputChunk) else {"type": "text", "text": text}
        for text in texts
        if (text.text if isinstance(text, InputChunk) else text).strip()
    ]


def _fields(message: BaseMessage) -> dict[str, Any]:
    """What a message has besides its content: role, name and tool calls. Raises PromptError for a
    message without a role."""
    try:
        (fields,) = convert_to_openai_messages([message.model_copy(update={"content": ""})])
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"a message is a {type(message).__name__}, which has no role: give messages of system, "
            "human, AI and tool, or a ChatMessage"
        ) from error
    fields.pop("refusal", None)
    if isinstance(message, AIMessage) and message.invalid_tool_calls:
        # As the model wrote them, since their arguments are not valid JSON.
        fields["tool_calls"] = [
            *fields.get("tool_calls", ()),
            *(
                {
                    "type": "function",
                    "id": call["id"],
                    "function": {"name": call["name"], "arguments": call["args"]},
                }
                for call in message.invalid_tool_calls
            ),
        ]
    return dict(fields)


def _texts(message: BaseMessage) -> list[str | InputChunk]:
    """The texts and chunks of one message, in order."""
    if isinstance(message.content, str):
        return [message.content] if message.content else []
    texts: list[str | InputChunk] = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str) or kind == "text":
            text = block if isinstance(block, str) else str(block.get("text", ""))
            texts += [text] if text.strip() else []
        elif kind == "text-plain":
            texts.append(_text_plain(block))
        elif not (isinstance(message, AIMessage) and kind in _SKIPPED_BLOCKS):
            raise PromptError(
                f"a message has content of type {kind!r}, which this model cannot read: give it "
                "text, and chunks as text-plain blocks"
            )
    return texts


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
