"""What requests may say. A field that nobody knows is an error, and so is one whose effect we do
not have; fields of OpenAI's that change no answer are accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from ragcache.settings import Ratio
from ragcache.text import replace_surrogates_in
from ragcache.types import Sampling, invalid_id_reason

T = TypeVar("T")

_TEN_YEARS = 10 * 365 * 86400
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_METADATA, _LONGEST_METADATA = 100, 16 << 10
_MOST = 10_000  # of a request's messages, texts or documents

#: A list of which the first wrong item is told of: there may be a million.
Many = Annotated[list[T], Field(fail_fast=True, max_length=_MOST)]


def _stop(given: Any) -> Any:
    """Texts that end an answer, of one or a list. Raises ValueError."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("give a text, or a list of texts, that end the answer")
    if len(texts) > _MOST_STOPS:
        raise ValueError(f"{len(texts)} texts are given, and {_MOST_STOPS} may be: leave some out")
    if not all(0 < len(text) <= _LONGEST_STOP for text in texts):
        raise ValueError(f"give texts of 1 to {_LONGEST_STOP} characters each")
    return texts


Stop = Annotated[list[str], BeforeValidator(_stop)]

#: What would change an answer's meaning, and the values with which it does not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "annotations": ([],),
}


class WrongField(ValueError):
    """What is wrong with one ``field``, found where all of them are known."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _check_supported(model: BaseModel, table: dict[str, tuple[Any, ...]]) -> None:
    for name, harmless in table.items():
        value = getattr(model, name)
        if value is not None and value not in harmless:
            raise WrongField(name, f"{name} is not supported: leave it out")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > len(cls.model_fields):
            unknown = next(name for name in given if name not in cls.model_fields)
            raise WrongField(unknown, "this field is unknown here")
        return replace_surrogates_in(given)


class Sampled(Strict):
    """How to decode; what is not given comes from the settings."""

    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)

    def sampling(self, default: Sampling, most: int | None = None) -> Sampling:
        return Sampling(
            max_tokens=most or self.max_tokens or default.max_tokens,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=self.top_p or default.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


class Fusion(Strict):
    """How to fuse; what is not given comes from the settings."""

    mode: str | None = Field(None, max_length=200)
    ratio: Ratio | None = None
    top_k: int | None = Field(None, ge=1, le=1000)
    neighbours: int | None = Field(None, ge=0, le=100)
    require_chunks: bool | None = Field(
        None, description="answer 422 where there are no chunks to answer from"
    )
    trace: bool = Field(False, description="report every token")


class Search(Strict):
    question: str
    top_k: int | None = Field(None, ge=1, le=1000)
    neighbours: int | None = Field(None, ge=0, le=100)


class Tokenize(Strict):
    """A text, or a question and the documents that come with it."""

    text: str | None = None
    question: str | None = None
    documents: Many[str | dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> Tokenize:
        if (self.text is None) == (self.question is None):
            raise ValueError("give a text, or a question with the documents of its prompt")
        if self.text is not None and self.documents is not None:
            raise ValueError("documents come with a question: leave out text, or documents")
        return self


class Query(Sampled, Fusion):
    question: str
    stream: bool = False


class Options(Fusion):
    """The ``ragcache`` object of a chat."""

    retrieve: bool | None = Field(
        None, description="look for chunks; default: where the request brings none"
    )


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        if self.type != "text" or self.text is None:
            raise ValueError(f"parts of type {self.type!r} are not supported: send text")
        return self


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[Part] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None
    annotations: Any = None

    @model_validator(mode="after")
    def _supported(self) -> Message:
        _check_supported(self, _UNSUPPORTED_IN_MESSAGES)
        if self.content is None:
            raise WrongField(
                "content", "the message has no content: give its text, or leave the message out"
            )
        return self

    @property
    def texts(self) -> list[str]:
        assert self.content is not None
        if isinstance(self.content, str):
            return [self.content]
        return [part.text or "" for part in self.content]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class Chat(Sampled):
    model: str
    messages: Many[Message] = Field(min_length=1)
    documents: Many[str | dict[str, Any]] | None = None
    ragcache: Options = Options.model_validate({})
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    user: Any = Field(None, description="ignored, as all that follows")
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


def _id(given: str) -> str:
    if (why := invalid_id_reason(given)) is not None:
        raise ValueError(f"this cannot be a document's id: {why}")
    return given


Id = Annotated[str, AfterValidator(_id)]


def _metadata(given: Any) -> Any:
    """Raises ValueError for more than is kept with every chunk of a document."""
    if isinstance(given, dict):
        if len(given) > _MOST_METADATA:
            raise ValueError(f"{len(given)} entries are given, and {_MOST_METADATA} may be")
        length = sum(len(text) for pair in given.items() for text in pair if isinstance(text, str))
        if length > _LONGEST_METADATA:
            raise ValueError(
                f"{length} characters are given, and {_LONGEST_METADATA} may be, for every chunk "
                "of the document has them: put what is long into the text"
            )
    return given


Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]


class NewDocument(Strict):
    id: Id
    text: Annotated[str, Field(min_length=1)]
    metadata: Metadata = Field(default_factory=dict)


class NewDocuments(Strict):
    documents: Many[NewDocument] = Field(min_length=1)
    ttl_s: float | None = Field(None, gt=0, le=_TEN_YEARS)
    pinned: bool | None = None


class NewJob(NewDocuments):
    index: bool = Field(True, description="false: compute KV alone, and keep no documents")


class NewChunks(Strict):
    chunks: Many[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
