"""The interface of chat model and retriever to a store in this process or to a service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from langchain_core.documents import Document

from ragcache.core.request import Misses, RetrieveOptions
from ragcache.engine.chat_documents import DocumentsIn
from ragcache.langchain.convert import InputChunk
from ragcache.retriever.metadata import MetadataFilter
from ragcache.retriever.search_options import SearchOptions
from ragcache.settings import Ratio


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Messages, and the documents beside them. For fields that are None the backend's settings
    apply."""

    messages: tuple[Mapping[str, Any], ...]  # as RagCache.ask takes them
    documents: tuple[InputChunk, ...] = ()
    model: str = ""  # empty: whichever model the backend has
    mode: str | None = None
    ratio: Ratio | None = None
    misses: Misses | None = None
    instructions: str | None = None
    template: str | None = None
    documents_in: DocumentsIn | None = None
    find_chunks: bool | None = None
    require_chunks: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None  # as in OpenAI's API
    stop: tuple[str, ...] = ()
    timeout: float | None = None  # seconds until TimeoutError


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A question to retrieve chunks for. For options that are absent or None the backend's settings
    apply."""

    question: str
    options: RetrieveOptions = field(default_factory=lambda: RetrieveOptions())

    def __post_init__(self) -> None:
        """Raise ConfigError for options out of their range, before they are sent anywhere."""
        given: dict[str, Any] = {n: v for n, v in self.options.items() if v is not None}
        if (accepted := given.pop("filter", None)) is not None:
            MetadataFilter.of(accepted)
        SearchOptions(given.pop("top_k", 1), **given)


@dataclass(frozen=True, slots=True)
class AnswerMetadata:
    """What a backend reports about a finished answer."""

    model: str
    finish_reason: Literal["stop", "length"]
    input_tokens: int
    cached_tokens: int  # of these, with KV loaded from the store
    output_tokens: int
    report: dict[str, Any]  # as ragcache.api.serialize.report_json


class Backend(Protocol):
    """Answers questions. Any number of threads and event loops may use it at once.

    The ``a...`` methods do the same as their counterparts and never block the event loop.
    """

    def model_name(self) -> str:
        """The name of the backend's model; empty if it is unknown."""
        ...

    async def amodel_name(self) -> str: ...

    def token_ids(self, text: str) -> list[int]:
        """A text's tokens, by the tokenizer of the backend's model."""
        ...

    def count(self, request: ChatRequest) -> int:
        """Tokens of a request's prompt."""
        ...

    def search(self, request: SearchRequest) -> list[Document]:
        """The chunks nearest to a question, as :meth:`RagCache.retrieve` finds them."""
        ...

    async def asearch(self, request: SearchRequest) -> list[Document]: ...

    def ask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]:
        """The answer's text and its metadata."""
        ...

    async def aask(self, request: ChatRequest) -> tuple[str, AnswerMetadata]: ...

    def stream(self, request: ChatRequest) -> Generator[str | AnswerMetadata, None, None]:
        """Pieces of the answer's text, then its metadata. Closing the generator early cancels the
        request."""
        ...

    def astream(self, request: ChatRequest) -> AsyncGenerator[str | AnswerMetadata, None]: ...
