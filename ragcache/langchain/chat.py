"""The chat model: answers from chunks whose KV is stored, and reports what was reused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from operator import itemgetter
from typing import Any, Literal, NoReturn

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel, ConfigDict, PrivateAttr

from ragcache.core.request import Misses
from ragcache.engine.chat_documents import DocumentsIn
from ragcache.langchain.backend import AnswerMetadata, ChatRequest
from ragcache.langchain.connection import BackendConnection
from ragcache.langchain.convert import MATCHED, ConvertedMessages, convert_messages
from ragcache.langchain.messages import RagCacheMessage, RagCacheMessageChunk
from ragcache.settings import Ratio
from ragcache.util.list_argument import require_list
from ragcache.util.option_names import check_options

#: Options of the model that a call or ``bind`` may set.
_OPTIONS = {
    "model",
    "mode",
    "ratio",
    "misses",
    "instructions",
    "template",
    "documents_in",
    "find_chunks",
    "require_chunks",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "timeout",
    "response_format",
}
#: All options of a call.
_CALL_OPTIONS = _OPTIONS | {"documents", "stop"}
#: Options that LangChain binds for its traces.
_TRACE_OPTIONS = {"ls_structured_output_format", "structured_output_format"}

_NO_TOOLS = (
    "ChatRagCache cannot call tools: its answers are text. Call the tool in a step of the chain or "
    "graph and pass its documents to this model (examples/langchain/agent.py), or let another "
    "model choose tools."
)


class ChatRagCache(BackendConnection, BaseChatModel):
    """A chat model that answers from chunks, with a store in this process or a running service.

    ``store=`` or ``base_url=`` says which one, see :class:`BackendConnection`.

    The messages go to the model's chat template as they are, and chunks stay where they stand:
    ``text-plain`` blocks (:func:`rag_messages` makes them), all but the last of several text blocks
    of a human message, documents in ``ToolMessage.artifact``, and stored chunks that are found in
    long texts, such as the context in a system message. ``documents=`` of the call or of ``bind``
    are placed by the template, or else in the message ``documents_in``. A chunk that is not stored
    yet is computed with its first question, and stored before the answer ends. Nothing is
    retrieved. If the last message is an AIMessage, it is continued.

    ``instructions`` are the system message of messages that have none. ``template`` is the Jinja
    source of a chat template to use in place of the model's own; a service accepts it only if it
    was started with ``--trust-request-templates``. With ``require_chunks``, messages without chunks
    raise PromptError. Tools and images are not supported; tool calls and results in the messages
    are passed to the template.

    An answer's ``response_metadata["ragcache"]`` has the report: mode, TTFT, what was reused of
    each chunk, and in ``boundaries`` the sources of the chunks. The settings of the store or
    service give the values of options that are None.
    """

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
    stop: list[str] | None = None
    timeout: float | None = None  # seconds
    response_format: dict[str, Any] | None = None  # as in OpenAI's API
    streaming: bool = False

    model_config = ConfigDict(extra="forbid")

    _name: str = PrivateAttr(default="")  # the name of the backend's model

    @property
    def _llm_type(self) -> str:
        return "ragcache"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        connection = (
            {"store": str(self.store)} if self.base_url is None else {"base_url": self.base_url}
        )
        return {**connection, **{name: getattr(self, name) for name in _OPTIONS}}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"api_key": "RAGCACHE_API_KEY"}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        stops = self.stop if stop is None else stop
        params = super()._get_ls_params(stop=stops or None, **kwargs)
        params["ls_model_name"] = kwargs.get("model") or self._name or self.model or "ragcache"
        return params

    # LangChain reads the parameters of a trace before the answer, so these methods first open the
    # backend to know its model's name.
    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        self._name = self.backend.model_name()
        return super().generate(*args, **kwargs)

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        self._name = await (await self.aopen_backend()).amodel_name()
        return await super().agenerate(*args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[AIMessageChunk]:
        self._name = self.backend.model_name()
        yield from super().stream(*args, **kwargs)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        self._name = await (await self.aopen_backend()).amodel_name()
        async with aclosing(super().astream(*args, **kwargs)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def bind(self, **kwargs: Any) -> Any:
        """Bind options to every call. Raises TypeError for an unknown one."""
        check_options(kwargs, _CALL_OPTIONS | _TRACE_OPTIONS, type(self).__name__)
        return super().bind(**kwargs)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: tools are not supported."""
        raise NotImplementedError(_NO_TOOLS)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """A runnable whose answers follow ``schema``, as of LangChain's chat models of OpenAI.

        A Pydantic class gives its instances; a TypedDict or JSON schema gives dictionaries. The
        tokens of an answer are chosen among those that the schema allows, so it is valid unless
        ``max_tokens`` ends it early. With ``json_mode`` any object is allowed, and parsed by the
        schema. The model is not told the schema: describe it in the prompt. ``strict`` changes
        nothing. Raises ValueError for another method, and TypeError for other options.
        """
        if method not in ("json_schema", "json_mode"):
            raise ValueError(f"method is {method!r}: use json_schema or json_mode")
        if kwargs:
            raise TypeError(f"{next(iter(kwargs))}: unknown option of with_structured_output")
        wanted = convert_to_json_schema(schema)
        named = {"name": wanted.get("title", "answer"), "schema": wanted}
        form: dict[str, Any] = {"type": "json_schema", "json_schema": named}
        model: Runnable[LanguageModelInput, Any] = self.bind(
            response_format=form if method == "json_schema" else {"type": "json_object"},
            ls_structured_output_format={"kwargs": {"method": method}, "schema": wanted},
        )
        parser: Runnable[Any, Any] = JsonOutputParser()
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            parser = PydanticOutputParser(pydantic_object=schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks(
            [failed], exception_key="parsing_error"
        )

    def get_token_ids(self, text: str) -> list[int]:
        """The text's tokens, by the tokenizer of the backend's model, without special tokens.

        A service raises PromptError for a text that is too long to count.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.backend.token_ids(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Any] | None = None,
        *,
        documents: Iterable[Any] | None = None,
    ) -> int:
        """The number of tokens of the prompt of these messages: the ``input_tokens`` of a call.

        Without messages, it is 0. Tools are not supported.
        """
        if tools:
            self.bind_tools(tools)
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages)
        converted = convert_messages(messages, documents)
        return self.backend.count(self._request(converted, None, {})) if messages else 0

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        converted = _convert(messages, kwargs)
        return _result(converted, *self.backend.ask(self._request(converted, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        converted, backend = _convert(messages, kwargs), await self.aopen_backend()
        return _result(converted, *await backend.aask(self._request(converted, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        converted = _convert(messages, kwargs)
        with closing(self.backend.stream(self._request(converted, stop, kwargs))) as pieces:
            for piece in pieces:
                chunk = _piece(converted, piece)
                if run_manager and chunk.text:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        converted, backend = _convert(messages, kwargs), await self.aopen_backend()
        async with aclosing(backend.astream(self._request(converted, stop, kwargs))) as pieces:
            async for piece in pieces:
                chunk = _piece(converted, piece)
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(
        self, converted: ConvertedMessages, stop: Sequence[str] | None, options: dict[str, Any]
    ) -> ChatRequest:
        """The request of a call, whose options take precedence over the model's. Raises TypeError
        for unknown options."""
        check_options(options, _CALL_OPTIONS, type(self).__name__)
        fields = {name: getattr(self, name) for name in _OPTIONS}
        called = {name: value for name, value in options.items() if name in _OPTIONS}
        fields |= {name: value for name, value in called.items() if value is not None}
        stop = self.stop if stop is None else stop
        stop = () if stop is None else tuple(require_list(stop, "stop"))
        return ChatRequest(converted.messages, converted.documents, stop=stop, **fields)


def _convert(messages: Sequence[BaseMessage], options: dict[str, Any]) -> ConvertedMessages:
    return convert_messages(messages, options.get("documents"))


def _result(converted: ConvertedMessages, text: str, metadata: AnswerMetadata) -> ChatResult:
    response_metadata = _response_metadata(converted, metadata)
    message = RagCacheMessage(
        content=text, response_metadata=response_metadata, usage_metadata=_usage(metadata)
    )
    information = {"finish_reason": metadata.finish_reason}
    output = {name: response_metadata[name] for name in ("model_name", "ragcache")}
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info=information)],
        llm_output=output,
    )


def _piece(converted: ConvertedMessages, piece: str | AnswerMetadata) -> ChatGenerationChunk:
    if isinstance(piece, str):
        return ChatGenerationChunk(message=RagCacheMessageChunk(content=piece))
    last = RagCacheMessageChunk(
        content="",
        response_metadata=_response_metadata(converted, piece),
        usage_metadata=_usage(piece),
        chunk_position="last",
    )
    information = {"finish_reason": piece.finish_reason}
    return ChatGenerationChunk(message=last, generation_info=information)


def _usage(metadata: AnswerMetadata) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=metadata.input_tokens,
        output_tokens=metadata.output_tokens,
        total_tokens=metadata.input_tokens + metadata.output_tokens,
        input_token_details=InputTokenDetails(cache_read=metadata.cached_tokens),
    )


def _response_metadata(converted: ConvertedMessages, metadata: AnswerMetadata) -> dict[str, Any]:
    """The message's metadata. Its report has the callers' ids of chunks, and their sources."""
    report, ids = dict(metadata.report), converted.ids()
    for name in ("chunks", "passages"):
        report[name] = [
            {**entry, "id": ids.get(entry["id"], entry["id"])} for entry in report.get(name, ())
        ]
    sources = list(converted.sources)
    if len(report["chunks"]) > converted.chunks:
        sources.append(MATCHED)
    notes = []
    if converted.blank and converted.chunks:
        notes.append(f"{converted.blank} of the documents had no text, and were left out")
    if not report["chunks"]:
        empty = " and ".join(converted.sources)
        why = f"{empty} had none with text" if empty else "no message has any"
        notes.append(f"there are no documents: {why}, so the answer comes from the messages alone")
    report["fallbacks"] = [*report.get("fallbacks", ()), *notes]
    return {
        "model_name": metadata.model,
        "model_provider": "ragcache",
        "finish_reason": metadata.finish_reason,
        "ragcache": {**report, "boundaries": sources},
    }
