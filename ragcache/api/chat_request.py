"""Builds a Request from the body of a chat completion or of ``/v1/query``.

The messages of a chat are rendered by the model's chat template as they are. ``documents`` are
chunks, which the template places, or else go before the last user's text.
"""

from __future__ import annotations

from typing import Any

from ragcache.api.errors import ApiError
from ragcache.api.requests import Chat, Options, Query, Tokenize
from ragcache.core.request import Request
from ragcache.types import Chunk, Sampling

#: Fields of a document that become lines of its text as they are; others become ``name: value``.
_TEXT_FIELDS = "title", "text", "snippet", "content", "contents", "page_content"
_ID_FIELDS = "id", "doc_id"  # no part of the text


def chat_request(body: Chat, default: Sampling, *, trusts_templates: bool = False) -> Request:
    """The request of a chat. Raises ApiError if a document has no text.

    ``trusts_templates``: whether a request may bring a chat template, which is a program.
    """
    options, chunks = body.ragcache, _chunks(body)
    if options.retrieve and chunks:
        raise ApiError(
            400,
            "retrieve is for requests without documents: leave out retrieve, or the documents",
            param="ragcache.retrieve",
        )
    _check_template(options, trusts_templates)
    retrieve = body.documents is None if options.retrieve is None else options.retrieve
    return Request(
        messages=[message.as_given() for message in body.messages],
        chunks=None if retrieve else chunks,
        instructions=options.instructions,
        template=options.template,
        documents_in=options.documents_in,
        find_chunks=options.find_chunks,
        tools=body.tools or None,
        mode=options.mode,
        ratio=options.ratio,
        misses=options.misses,
        **options.retrieving,
        require_chunks=options.require_chunks,
        sampling=body.sampling(default, body.max_completion_tokens),
    )


def counted_request(body: Tokenize, *, trusts_templates: bool = False) -> Request:
    """The request whose prompt ``/v1/tokenize`` counts: with the documents of the body alone.
    Raises as :func:`chat_request`."""
    options = body.ragcache
    _check_template(options, trusts_templates)
    given = body.messages
    return Request(
        body.question or "",
        messages=None if given is None else [message.as_given() for message in given],
        chunks=_chunks(body),
        instructions=options.instructions,
        template=options.template,
        documents_in=options.documents_in,
        find_chunks=options.find_chunks,
        tools=body.tools or None,
    )


def query_request(body: Query, default: Sampling) -> Request:
    """The request of a body of ``/v1/query``."""
    return Request(
        body.question,
        mode=body.mode,
        ratio=body.ratio,
        misses=body.misses,
        instructions=body.instructions,
        **body.retrieving,
        require_chunks=body.require_chunks,
        sampling=body.sampling(default),
    )


def _chunks(body: Chat | Tokenize) -> list[Chunk]:
    return [_document_chunk(one, at) for at, one in enumerate(body.documents or ())]


def _check_template(options: Options, trusted: bool) -> None:
    if options.template is not None and not trusted:
        raise ApiError(
            400,
            "a chat template is a program, and this service runs none that requests bring: leave "
            "it out, or start the service with --trust-request-templates",
            param="ragcache.template",
        )


def _document_chunk(document: str | dict[str, Any], number: int) -> Chunk:
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
