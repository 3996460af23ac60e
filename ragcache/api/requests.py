"""Request bodies. An unknown field is an error, and so is a field of OpenAI's API that is not
supported; fields of it that do not affect answers are accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from ragcache.core.request import Misses, RetrieveOptions, retrieve_options
from ragcache.engine.chat_documents import DocumentsIn
from ragcache.engine.json_format import response_schema
from ragcache.errors import ConfigError
from ragcache.retriever.search_options import Retrieval
from ragcache.settings import Ratio
from ragcache.text import replace_surrogates_in
from ragcache.types import Sampling, invalid_id_reason

_T = TypeVar("_T")

_TEN_YEARS = 10 * 365 * 86400
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1000
_MAX_METADATA, _MAX_METADATA_LENGTH = 100, 16 << 10
_MAX_ITEMS = 10_000  # messages, texts or documents of a request

#: A list that is only validated up to its first invalid item.
_LimitedList = Annotated[list[_T], Field(fail_fast=True, max_length=_MAX_ITEMS)]


def _stop(given: Any) -> Any:
    """A list of stop strings, from one string or a list. Raises ValueError."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("give a text, or a list of texts, at which the answer ends")
    if len(texts) > _MAX_STOPS:
        raise ValueError(
            f"{len(texts)} texts are more than the limit of {_MAX_STOPS}: leave some out"
        )
    if not all(0 < len(text) <= _MAX_STOP_LENGTH for text in texts):
        raise ValueError(f"give texts of 1 to {_MAX_STOP_LENGTH} characters each")
    return texts


_Stop = Annotated[list[str], BeforeValidator(_stop)]

#: Unsupported fields, each with the values that have no effect and are accepted.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "annotations": ([],),
}


class _FieldError(ValueError):
    """An error of one ``field``, found by a validator of the whole model."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _check_supported(model: BaseModel, table: dict[str, tuple[Any, ...]]) -> None:
    for name, harmless in table.items():
        value = getattr(model, name)
        if value is not None and value not in harmless:
            raise _FieldError(name, f"{name} is not supported: leave it out")


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > len(cls.model_fields):
            unknown = next(name for name in given if name not in cls.model_fields)
            raise _FieldError(unknown, "this field is unknown")
        try:
            return replace_surrogates_in(given)
        except RecursionError as error:
            raise ValueError("it is nested too deep: flatten it") from error


class _SamplingOptions(StrictModel):
    """How to decode; the settings give the values of absent fields."""

    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: _Stop | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema with a schema that the answer follows"
    )

    @model_validator(mode="after")
    def _format(self) -> Self:
        try:
            Sampling(json_schema=response_schema(self.response_format))
        except (ConfigError, ValueError) as error:
            raise _FieldError("response_format", str(error)) from error
        return self

    def sampling(self, default: Sampling, most: int | None = None) -> Sampling:
        return Sampling(
            max_tokens=most or self.max_tokens or default.max_tokens,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=self.top_p or default.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            json_schema=response_schema(self.response_format),
        )


class _RetrieveOptions(StrictModel):
    """What to retrieve; the settings give the values of absent fields."""

    top_k: int | None = Field(None, ge=1, le=1000)
    neighbours: int | None = Field(None, ge=0, le=100)
    retrieval: Retrieval | None = None
    min_score: float | None = Field(None, ge=-1, le=1)
    mmr: float | None = Field(None, ge=0, le=1)
    rerank: int | None = Field(None, ge=0, le=1000)
    top_tokens: int | None = Field(None, ge=1)
    filter: dict[str, Any] | None = Field(
        None, description='metadata of the documents to search, such as {"year": {"$gte": 2020}}'
    )

    @property
    def retrieving(self) -> RetrieveOptions:
        return retrieve_options(self)


class _FusionOptions(_RetrieveOptions):
    """How to retrieve and fuse; the settings give the values of absent fields."""

    mode: str | None = Field(None, max_length=200)
    ratio: Ratio | None = None
    misses: Misses | None = None
    instructions: str | None = Field(None, description="system message, if there is none")
    require_chunks: bool | None = Field(
        None, description="respond with 422 if there are no chunks to answer from"
    )
    trace: bool = Field(False, description="report every token")


class Search(_RetrieveOptions):
    question: str


class Query(_SamplingOptions, _FusionOptions):
    question: str
    stream: bool = False


class Options(_FusionOptions):
    """The ``ragcache`` object of a chat."""

    retrieve: bool | None = Field(
        None, description="retrieve chunks; by default, if the request has no documents"
    )
    template: str | None = Field(None, description="chat template in Jinja")
    documents_in: DocumentsIn | None = None
    find_chunks: bool | None = Field(
        None, description="search long texts of messages for chunks whose KV can be reused"
    )


class Part(BaseModel):
    """A text, or a chunk, whose KV can be reused; ``id`` names a chunk in the report."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        if self.type not in ("text", "chunk") or self.text is None:
            raise ValueError(f"parts of type {self.type!r} are not supported: send text")
        return self


def _part(given: Any) -> Any:
    return {"type": "text", "text": given} if isinstance(given, str) else given


#: A part of a content, which clients such as LangChain's may also send as a string.
_Part = Annotated[Part, BeforeValidator(_part, json_schema_input_type=str | Part)]

#: A content, of which errors name what is wrong with its kind alone.
_Content = Annotated[
    Annotated[str, Tag("content-text")] | Annotated[_LimitedList[_Part], Tag("content-parts")],
    Discriminator(lambda given: f"content-{'parts' if isinstance(given, list) else 'text'}"),
]


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None
    annotations: Any = None

    @model_validator(mode="after")
    def _supported(self) -> Message:
        _check_supported(self, _UNSUPPORTED_IN_MESSAGES)
        if self.content is None and not self.tool_calls:
            raise _FieldError(
                "content", "the message has no content: give its text, or leave the message out"
            )
        return self

    def as_given(self) -> dict[str, Any]:
        """The message as a dictionary, without fields that a chat template does not read."""
        fields = {"name", "tool_calls", "tool_call_id"} & self.model_fields_set
        given = self.model_dump(include={"role", *fields}, exclude_none=True)
        if isinstance(self.content, list):
            fields = {"type", "text", "id"}
            parts = [part.model_dump(include=fields, exclude_none=True) for part in self.content]
            return {**given, "content": parts}
        return {**given, "content": self.content or ""}


class Tokenize(StrictModel):
    """A text; or a question or messages, with the documents of their prompt."""

    text: str | None = None
    question: str | None = None
    messages: Annotated[_LimitedList[Message], Field(min_length=1)] | None = None
    documents: _LimitedList[str | dict[str, Any]] | None = None
    tools: _LimitedList[dict[str, Any]] | None = None
    ragcache: Options = Options.model_validate({})

    @model_validator(mode="after")
    def _one_of_three(self) -> Tokenize:
        if sum(given is not None for given in (self.text, self.question, self.messages)) != 1:
            raise ValueError(
                "give either a text, or a question or messages with the documents of their prompt"
            )
        if self.text is not None and self.documents is not None:
            raise ValueError("documents belong to a question: leave out text, or documents")
        if self.messages is None and self.tools is not None:
            raise ValueError("tools belong to messages: give messages, or leave out tools")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class Chat(_SamplingOptions):
    model: str
    messages: _LimitedList[Message] = Field(min_length=1)
    documents: _LimitedList[str | dict[str, Any]] | None = None
    ragcache: Options = Options.model_validate({})
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Any = None
    tools: _LimitedList[dict[str, Any]] | None = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    user: Any = Field(None, description="ignored, like the fields that follow")
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @model_validator(mode="after")
    def _supported(self) -> Chat:
        _check_supported(self, _UNSUPPORTED)
        return self


def _kind_of(body: Any) -> str:
    messages = body.get("messages") if isinstance(body, dict) else None
    return "body-chat" if messages is not None else "body-query"


#: A body of ``/v1/query``, or with ``messages`` one of chat completions.
QueryOrChat = Annotated[
    Annotated[Query, Tag("body-query")] | Annotated[Chat, Tag("body-chat")],
    Discriminator(_kind_of),
]


def _id(given: str) -> str:
    if (why := invalid_id_reason(given)) is not None:
        raise ValueError(f"this cannot be a document's id: {why}")
    return given


_DocumentId = Annotated[str, AfterValidator(_id)]


def _metadata(given: Any) -> Any:
    """Raises ValueError for more metadata than the store keeps with every chunk."""
    if isinstance(given, dict):
        if len(given) > _MAX_METADATA:
            raise ValueError(f"{len(given)} entries are more than the limit of {_MAX_METADATA}")
        length = sum(len(text) for pair in given.items() for text in pair if isinstance(text, str))
        if length > _MAX_METADATA_LENGTH:
            raise ValueError(
                f"{length} characters are more than the limit of {_MAX_METADATA_LENGTH}, as every "
                "chunk of the document has its metadata: put long values into the text"
            )
    return given


_Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]


class NewDocument(StrictModel):
    id: _DocumentId
    text: Annotated[str, Field(min_length=1)]
    metadata: _Metadata = Field(default_factory=dict)


class NewDocuments(StrictModel):
    documents: _LimitedList[NewDocument] = Field(min_length=1)
    ttl_s: float | None = Field(None, gt=0, le=_TEN_YEARS)
    pinned: bool | None = None


class NewJob(NewDocuments):
    index: bool = Field(True, description="false: compute KV only, and keep no documents")


class NewChunks(StrictModel):
    chunks: _LimitedList[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
