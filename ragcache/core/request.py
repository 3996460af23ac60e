"""Requests: a question or a chat, with options. CLI, REST API and library make and pass them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, Unpack, cast

from ragcache.blend import Blender
from ragcache.engine.chat_documents import DocumentsIn
from ragcache.errors import PromptError
from ragcache.planning.cost_model import Speeds
from ragcache.retriever.metadata import Filter
from ragcache.retriever.search_options import Retrieval
from ragcache.settings import Ratio
from ragcache.types import Certificate, Chunk, Passage, Prompt, Sampling, Tokens
from ragcache.util.option_names import check_options

__all__ = [
    "Misses",
    "PromptRequest",
    "Request",
    "RequestOptions",
    "RetrieveOptions",
    "check_asks",
    "message_text",
    "request_texts",
    "retrieve_options",
]


#: How chunks and texts are computed whose KV is not stored:
#:
#: - ``exact``: in the prompt, as full prefill does;
#: - ``consistent``: alone, as they would be stored, and then fused like stored ones. The ratio is
#:   not changed by measured speeds. The answer then does not depend on what is stored.
Misses = Literal["exact", "consistent"]


class RetrieveOptions(TypedDict, total=False):
    """What to retrieve; see :class:`~ragcache.retriever.search_options.SearchOptions`. Absent and
    None options are taken from the settings."""

    top_k: int | None  # number of chunks to retrieve
    neighbours: int | None  # number of chunks to add before and after each retrieved chunk
    retrieval: Retrieval | None  # by vectors (dense), by words (bm25) or by both (hybrid)
    min_score: float | None  # least cosine similarity of a chunk with the question
    mmr: float | None  # 0 to 1: choose by maximal marginal relevance
    rerank: int | None  # how many of the chunks found the reranker puts in a new order; 0: none
    top_tokens: int | None  # the most tokens of the chunks with their neighbours
    #: Metadata of the documents to retrieve from, see
    #: :class:`~ragcache.retriever.metadata.MetadataFilter`. None: all.
    filter: Filter | None


class RequestOptions(RetrieveOptions, total=False):
    """Options of a :class:`Request`. Absent and None options are taken from the settings."""

    #: Chunks to use instead of retrieval, in this order. An empty list: answer without chunks.
    chunks: Sequence[str | Chunk | Passage] | None
    #: A chat in place of a question, as in OpenAI's API: dictionaries of ``role`` and ``content``.
    #: The model's chat template renders it as it is, with the chunks before the last user's text.
    messages: Sequence[Mapping[str, Any]] | None
    instructions: str | None  # the system message, where the messages have none
    template: str | None  # Jinja source of a chat template to use in place of the model's own
    documents_in: DocumentsIn | None  # the message that chunks are placed in: user or system
    #: Whether long texts of messages are searched for chunks whose KV can be reused.
    find_chunks: bool | None
    tools: Sequence[Mapping[str, Any]] | None  # for the chat template
    mode: str | Blender | None  # the fusion method
    ratio: Ratio | None  # share of rows to recompute; "auto": chosen by measured speeds
    misses: Misses | None  # how missing chunks are computed, see :data:`Misses`
    require_chunks: bool | None  # raise NoChunksError if there are no chunks
    sampling: Sampling | None
    #: Called before every layer and token. An exception that it raises ends the answer, for
    #: instance after a deadline, or when the client has disconnected.
    check: Callable[[], None] | None
    #: Whether missing chunks are computed and stored at the end of the answer. If not, call
    #: :meth:`ragcache.core.generate.GenerationStream.keep`.
    keep: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A question or messages, with the options of :class:`RequestOptions`."""

    question: str = ""
    chunks: Sequence[str | Chunk | Passage] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    instructions: str | None = None
    template: str | None = None
    documents_in: DocumentsIn | None = None
    find_chunks: bool | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    mode: str | Blender | None = None
    ratio: Ratio | None = None
    misses: Misses | None = None
    top_k: int | None = None
    neighbours: int | None = None
    retrieval: Retrieval | None = None
    min_score: float | None = None
    mmr: float | None = None
    rerank: int | None = None
    top_tokens: int | None = None
    filter: Filter | None = None
    require_chunks: bool | None = None
    sampling: Sampling | None = None
    check: Callable[[], None] | None = None
    keep: bool = True

    def with_chunks(self, chunks: Sequence[str | Chunk | Passage]) -> Request:
        """The same request over these chunks: nothing is retrieved for it, so it has no filter."""
        return replace(self, chunks=chunks, filter=None)

    @property
    def asked(self) -> str:
        """The question, or the text of the last message of a chat."""
        if self.messages is None:
            return self.question
        return message_text(self.messages[-1]) if self.messages else ""

    @classmethod
    def of(cls, question: str = "", **options: Unpack[RequestOptions]) -> Request:
        """A request with these options. TypeError for unknown ones."""
        check_options(options, RequestOptions.__annotations__, "a question")
        return cls(question, **options)


def retrieve_options(given: Any) -> RetrieveOptions:
    """The options of an object that has them as attributes."""
    return cast(
        RetrieveOptions, {name: getattr(given, name) for name in RetrieveOptions.__annotations__}
    )


def message_text(message: Any) -> str:
    """All text of a message of a request; empty for a message of another form."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def request_texts(request: Request) -> list[str]:
    """All texts of a request that its prompt will have."""
    chunks = (c.chunk if isinstance(c, Passage) else c for c in request.chunks or ())
    return [
        request.question,
        request.instructions or "",
        *map(message_text, request.messages or ()),
        *(chunk if isinstance(chunk, str) else chunk.text for chunk in chunks),
    ]


def check_asks(messages: Sequence[Any]) -> None:
    """Raise PromptError for messages without a question: none of a user or tool has text, or the
    last one is a user's and blank. Messages without a role are left to others."""
    roles = [each.get("role") if isinstance(each, Mapping) else None for each in messages]
    if not all(roles):
        return
    blank = [not message_text(each).strip() for each in messages]
    if messages and roles[-1] == "user" and blank[-1]:
        raise PromptError("the last message is empty: ask something")
    rules = ("system", "developer", "assistant")  # roles that ask nothing
    asks = (not (empty or role in rules) for role, empty in zip(roles, blank, strict=True))
    if messages and not any(asks):
        raise PromptError(
            f"no message of a user or tool among these {len(messages)} has text: ask something"
        )


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request with its prompt, after retrieval, and with all settings resolved."""

    prompt: Prompt
    blender: Blender
    sampling: Sampling = field(default_factory=Sampling)
    passages: tuple[Passage, ...] = ()  # of the prompt's chunks, for the report
    retrieval_s: float = 0.0
    no_chunks: str | None = None  # why the prompt has no chunks; None where it has some
    #: With speeds, :mod:`ragcache.planning.controller` chooses which chunks are loaded, and the
    #: ratio. ``blender`` must then be one that the controller can set; its own ratio is the
    #: minimum. None: all stored chunks are loaded.
    speeds: Speeds | None = None
    is_calibrated: bool = False  # the controller may choose any ratio from that minimum on
    certificate: Certificate | None = None  # for the report; see :mod:`ragcache.core.calibration`
    misses: Misses = "exact"
    is_chat: bool = False  # whether the prompt is of messages, and may be continued by a next turn
    check: Callable[[], None] | None = None
    keep: bool = True
    #: Called with the answer's text so far; True ends the answer, as a stop string does.
    until: Callable[[str], bool] | None = None
    #: For greedy decoding by an engine of this process: tokens whose logits are computed by teacher
    #: forcing, after the first token of the answer. The answer is decoded with them as a draft.
    #: Empty: those of the answer itself, if nothing is computed late for it (else ValueError).
    #: None: no logits but those of the prompt are kept.
    forced: Tokens | None = None
