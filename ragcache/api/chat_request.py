"""From OpenAI's messages to a question, chunks, and what stands between them.

A prompt has a fixed prefix, chunks, and a question; a chunk's KV depends on the prefix, so nothing
of a request goes in there. Nothing of it is left out either:

- the last message must be the user's, and the last text of it is the question;
- ``documents`` are chunks, and so is every text of a user's message but the last, in this order;
- what system and developer messages say, and then earlier turns, stands before the question
  (:func:`lead`). It is computed for every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragcache.api.errors import Problem
from ragcache.api.requests import Chat, Message, Query
from ragcache.core.request import Request
from ragcache.types import Chunk, Sampling

#: Fields of a document that are its text, each alone on its lines; others are ``name: value``.
_PLAIN = "title", "text", "snippet", "content", "contents", "page_content"
_NAMES = "id", "doc_id"  # not part of the text


def ask(chat: Chat, default: Sampling) -> Request:
    """What a chat asks. Raises Problem where there is no question, or a document has no text."""
    last = chat.messages[-1]
    if last.role != "user" or not last.texts or not last.texts[-1].strip():
        raise Problem(
            400,
            "the last message must be the user's, and end with a text: that is the question",
            param="messages",
        )
    chunks = [document(given, at) for at, given in enumerate(chat.documents or ())]
    texts = [t for m in chat.messages if m.role == "user" for t in m.texts[:-1]]
    chunks += [Chunk("message", number, text) for number, text in enumerate(texts)]
    given = chunks or chat.documents is not None
    options = chat.ragcache
    if options.retrieve and chunks:
        raise Problem(
            400,
            "retrieve is for requests without documents: give some, or let some be found",
            param="ragcache.retrieve",
        )
    retrieve = not given if options.retrieve is None else options.retrieve
    return Request(
        last.texts[-1],
        chunks=None if retrieve else chunks,
        lead=lead(chat.messages),
        mode=options.mode,
        ratio=options.ratio,
        top_k=options.top_k,
        neighbours=options.neighbours,
        require_chunks=options.require_chunks,
        sampling=chat.sampling(default, chat.max_completion_tokens),
    )


def ask_query(query: Query, default: Sampling) -> Request:
    """What ``/v1/query`` is asked."""
    return Request(
        query.question,
        mode=query.mode,
        ratio=query.ratio,
        top_k=query.top_k,
        neighbours=query.neighbours,
        require_chunks=query.require_chunks,
        sampling=query.sampling(default),
    )


def lead(messages: Sequence[Message]) -> str:
    """What stands before the question: instructions, and earlier turns as ``User:`` and
    ``Assistant:`` lines."""
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


def document(given: str | dict[str, Any], number: int) -> Chunk:
    """A document of a chat as the text of a chunk. Raises Problem where it has none.

    A string; ``{"title", "text"}`` as Hugging Face's templates and vLLM take them; ``{"id",
    "data": ...}`` or ``{"title", "snippet", ...}`` as Cohere does. What has only ``text`` is that
    text, and finds the KV of the same text wherever it came from.
    """
    where = f"documents.{number}"
    if isinstance(given, str):
        return Chunk("documents", number, given)
    name = next((str(given[key]) for key in _NAMES if given.get(key) is not None), "documents")
    data = given.get("data", {key: value for key, value in given.items() if key not in _NAMES})
    if isinstance(data, str):
        data = {"text": data}
    if "data" in given and set(given) - {"data", *_NAMES} or not isinstance(data, dict):
        raise Problem(400, f"{where}: give its text in data, and nothing beside it", param=where)
    lines = []
    for key in sorted(data, key=lambda key: _PLAIN.index(key) if key in _PLAIN else len(_PLAIN)):
        value = data[key]
        if value is None:  # a title that a document has not, say
            continue
        if not isinstance(value, (str, int, float)):
            message = f"{where}.{key}: only text and numbers can stand in a document"
            raise Problem(400, message, param=f"{where}.{key}")
        lines.append(str(value) if key in _PLAIN else f"{key}: {value}")
    text = "\n".join(line for line in lines if line.strip())
    if not text:
        raise Problem(400, f"{where} has no text: give some, or leave it out", param=where)
    return Chunk(name, number, text)
