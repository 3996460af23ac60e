"""Builds a Request from the body of a chat completion or of ``/v1/query``.

A prompt is a fixed prefix, chunks, and a question. A chunk's KV depends on the prefix, so no part
of a chat goes into the prefix. No part of it is dropped either:

- The last message must be the user's, and its last text is the question.
- ``documents`` are chunks, and so is every text but the last of a user's message, in this order.
- The texts of system and developer messages, and then earlier turns, go before the question
  (:func:`_lead`). They are computed for every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragcache.api.errors import ApiError
from ragcache.api.requests import Chat, Message, Query
from ragcache.core.request import Request
from ragcache.types import Chunk, Sampling

#: Fields of a document that become lines of its text as they are; others become ``name: value``.
_TEXT_FIELDS = "title", "text", "snippet", "content", "contents", "page_content"
_ID_FIELDS = "id", "doc_id"  # no part of the text


def chat_request(body: Chat, default: Sampling) -> Request:
    """The request of a chat. Raises ApiError if it has no question, or a document has no text."""
    last = body.messages[-1]
    if last.role != "user" or not last.texts or not last.texts[-1].strip():
        raise ApiError(
            400,
            "the last message must be the user's and end with a text, which is the question",
            param="messages",
        )
    chunks = [document_chunk(one, at) for at, one in enumerate(body.documents or ())]
    texts = [t for m in body.messages if m.role == "user" for t in m.texts[:-1]]
    chunks += [Chunk("message", number, text) for number, text in enumerate(texts)]
    has_chunks = chunks or body.documents is not None
    options = body.ragcache
    if options.retrieve and chunks:
        raise ApiError(
            400,
            "retrieve is for requests without documents: leave out retrieve, or the documents",
            param="ragcache.retrieve",
        )
    retrieve = not has_chunks if options.retrieve is None else options.retrieve
    return Request(
        last.texts[-1],
        chunks=None if retrieve else chunks,
        lead=_lead(body.messages),
        mode=options.mode,
        ratio=options.ratio,
        top_k=options.top_k,
        neighbours=options.neighbours,
        require_chunks=options.require_chunks,
        sampling=body.sampling(default, body.max_completion_tokens),
    )


def query_request(body: Query, default: Sampling) -> Request:
    """The request of a body of ``/v1/query``."""
    return Request(
        body.question,
        mode=body.mode,
        ratio=body.ratio,
        top_k=body.top_k,
        neighbours=body.neighbours,
        require_chunks=body.require_chunks,
        sampling=body.sampling(default),
    )


def _lead(messages: Sequence[Message]) -> str:
    """The text before the question: instructions, then earlier turns as lines that begin with
    ``User:`` or ``Assistant:``."""
    system = [t for m in messages if m.role in ("system", "developer") for t in m.texts]
    turns = [
        f"{m.role.capitalize()}: {m.texts[-1] if m.role == 'user' else ' '.join(m.texts)}"
        for m in messages[:-1]
        if m.role in ("user", "assistant") and m.texts
    ]
    parts = [text.strip() for text in system if text.strip()]
    if turns:
        parts.append("\n".join(["Earlier turns:", *turns]))
    return "\n\n".join(parts)


def document_chunk(document: str | dict[str, Any], number: int) -> Chunk:
    """The chunk of document ``number`` of a chat. Raises ApiError if it has no text.

    A document is a string; ``{"title", "text"}`` as in Hugging Face's templates and vLLM; or
    ``{"id", "data": ...}`` or ``{"title", "snippet", ...}`` as in Cohere's API. A document with
    nothing but ``text`` becomes that text, so it reuses the KV of the same text from any source.
    """
    where = f"documents.{number}"
    if isinstance(document, str):
        return Chunk("documents", number, document)
    name = next(
        (str(document[key]) for key in _ID_FIELDS if document.get(key) is not None), "documents"
    )
    data = document.get(
        "data", {key: value for key, value in document.items() if key not in _ID_FIELDS}
    )
    if isinstance(data, str):
        data = {"text": data}
    if "data" in document and set(document) - {"data", *_ID_FIELDS} or not isinstance(data, dict):
        raise ApiError(
            400, f"{where}: give its text in data, and no other fields beside it", param=where
        )
    lines = []
    for key in sorted(
        data, key=lambda key: _TEXT_FIELDS.index(key) if key in _TEXT_FIELDS else len(_TEXT_FIELDS)
    ):
        value = data[key]
        if value is None:  # such as a title that the document does not have
            continue
        if not isinstance(value, (str, int, float)):
            message = f"{where}.{key}: a document may only have text and numbers"
            raise ApiError(400, message, param=f"{where}.{key}")
        lines.append(str(value) if key in _TEXT_FIELDS else f"{key}: {value}")
    text = "\n".join(line for line in lines if line.strip())
    if not text:
        raise ApiError(
            400, f"{where} has no text: give a text, or leave the document out", param=where
        )
    return Chunk(name, number, text)
