"""The chat model: answers from chunks whose KV is stored, and reports what was reused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any, NoReturn

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from pydantic import ConfigDict, PrivateAttr

from ragcache.errors import PromptError
from ragcache.langchain.backend import AnswerMetadata, ChatRequest
from ragcache.langchain.chunk_parsing import MATCHED, ParsedMessages, parse_messages
from ragcache.langchain.connection import BackendConnection
from ragcache.langchain.messages import RagCacheMessage, RagCacheMessageChunk
from ragcache.settings import Ratio
from ragcache.util.list_argument import require_list
from ragcache.util.option_names import check_options

#: Options of the model that a call or ``bind`` may set.
_OPTIONS = {"model", "mode", "ratio", "max_tokens", "temperature", "top_p", "seed", "timeout"}
#: All options of a call.
_CALL_OPTIONS = _OPTIONS | {"documents", "require_chunks", "stop"}
#: Options that LangChain binds for its traces.
_TRACE_OPTIONS = {"ls_structured_output_format", "structured_output_format"}

_NO_TOOLS = (
    "ChatRagCache cannot {what}: so that stored KV fits, a prompt is a prefix, chunks and a "
    "question, without tools or schemas. {instead}"
)


class ChatRagCache(BackendConnection, BaseChatModel):
    """A chat model that answers from chunks, with a store in this process or a running service.

    ``store=`` or ``base_url=`` says which one, see :class:`BackendConnection`.

    The last human message is the question. Chunks are ``text-plain`` blocks (:func:`rag_messages`
    makes them), all but the last of several text parts of the last human message, documents in
    ``ToolMessage.artifact``, and ``documents=`` of the call or of ``bind``. Without any of these,
    the texts of stored chunks are searched for in the messages, and the report says so. A chunk
    that is not stored yet is computed with its first question, and stored before the answer ends.

    An empty list of documents means that there are none: no chunks are searched for, and the
    question is answered without any, as the report's ``fallbacks`` say. With ``require_chunks`` a
    question without chunks raises PromptError.

    Other messages are not dropped: instructions, earlier turns and tool results go before the
    question (:attr:`ragcache.langchain.chunk_parsing.ParsedMessages.text`). They are computed for
    every prompt; only chunks are reused. Tools and images are not supported.

    An answer's ``response_metadata["ragcache"]`` has the report: mode, TTFT, what was reused of
    each chunk, and in ``boundaries`` the sources of the chunks. The settings of the store or
    service give the values of options that are None.
    """

    mode: str | None = None
    ratio: Ratio | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None  # seconds
    streaming: bool = False
    require_chunks: bool = False  # refuse a question without chunks

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
        instead = (
            "Call the tool in a step of the chain or graph and pass its documents to this model "
            "(examples/langchain/agent.py), or let another model choose tools."
        )
        raise NotImplementedError(_NO_TOOLS.format(what="call tools", instead=instead))

    def with_structured_output(self, schema: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: an answer is text."""
        instead = "Parse its text with an output parser, or pass it to another model."
        raise NotImplementedError(_NO_TOOLS.format(what="follow a schema", instead=instead))

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

        Messages without a question are counted as they are. Tools are not supported.
        """
        if tools:
            self.bind_tools(tools)
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages)
        parsed = parse_messages(messages, documents)
        if not parsed.sources:
            parsed = parsed.match_known(self.backend.known_texts())
        return self.backend.count(parsed.text_or_blank, parsed.chunks)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        parsed = _parse(messages, kwargs)
        if not parsed.sources:
            parsed = parsed.match_known(self.backend.known_texts())
        return _result(parsed, *self.backend.ask(self._request(parsed, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        parsed, backend = _parse(messages, kwargs), await self.aopen_backend()
        if not parsed.sources:
            parsed = parsed.match_known(await backend.aknown_texts())
        return _result(parsed, *await backend.aask(self._request(parsed, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        parsed = _parse(messages, kwargs)
        if not parsed.sources:
            parsed = parsed.match_known(self.backend.known_texts())
        with closing(self.backend.stream(self._request(parsed, stop, kwargs))) as pieces:
            for piece in pieces:
                chunk = _piece(parsed, piece)
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
        parsed, backend = _parse(messages, kwargs), await self.aopen_backend()
        if not parsed.sources:
            parsed = parsed.match_known(await backend.aknown_texts())
        async with aclosing(backend.astream(self._request(parsed, stop, kwargs))) as pieces:
            async for piece in pieces:
                chunk = _piece(parsed, piece)
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(
        self, parsed: ParsedMessages, stop: Sequence[str] | None, options: dict[str, Any]
    ) -> ChatRequest:
        """The request of a call, whose options take precedence over the model's. Raises TypeError
        for unknown options, and PromptError if chunks are required and there are none."""
        check_options(options, _CALL_OPTIONS, type(self).__name__)
        required = options.get("require_chunks")
        if not parsed.chunks and (self.require_chunks if required is None else required):
            raise PromptError(
                f"{_no_chunks(parsed)}, and require_chunks refuses a question without chunks: give "
                "documents, or leave require_chunks out"
            )
        fields = {name: getattr(self, name) for name in _OPTIONS}
        called = {name: value for name, value in options.items() if name in _OPTIONS}
        fields |= {name: value for name, value in called.items() if value is not None}
        stop = self.stop if stop is None else stop
        stop = () if stop is None else tuple(require_list(stop, "stop"))
        return ChatRequest(parsed.text, parsed.chunks, stop=stop, **fields)


def _parse(messages: Sequence[BaseMessage], options: dict[str, Any]) -> ParsedMessages:
    return parse_messages(messages, options.get("documents"))


def _no_chunks(parsed: ParsedMessages) -> str:
    """Why there are no chunks."""
    if parsed.sources:
        return f"there are no documents: {' and '.join(parsed.sources)} had none with text"
    return "there are no documents: no message has any, and none was found in the messages' texts"


def _result(parsed: ParsedMessages, text: str, metadata: AnswerMetadata) -> ChatResult:
    response_metadata = _response_metadata(parsed, metadata)
    message = RagCacheMessage(
        content=text, response_metadata=response_metadata, usage_metadata=_usage(metadata)
    )
    information = {"finish_reason": metadata.finish_reason}
    output = {name: response_metadata[name] for name in ("model_name", "ragcache")}
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info=information)],
        llm_output=output,
    )


def _piece(parsed: ParsedMessages, piece: str | AnswerMetadata) -> ChatGenerationChunk:
    if isinstance(piece, str):
        return ChatGenerationChunk(message=RagCacheMessageChunk(content=piece))
    last = RagCacheMessageChunk(
        content="",
        response_metadata=_response_metadata(parsed, piece),
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


def _response_metadata(parsed: ParsedMessages, metadata: AnswerMetadata) -> dict[str, Any]:
    """The message's metadata. Its report has the caller's ids of chunks, and their sources."""
    report = dict(metadata.report)
    for name in ("chunks", "passages"):
        if len(entries := report.get(name, ())) == len(parsed.chunks):
            report[name] = [
                {**entry, "id": entry["id"] if chunk.id is None else chunk.id}
                for entry, chunk in zip(entries, parsed.chunks, strict=True)
            ]
    notes = []
    if MATCHED in parsed.sources:
        notes.append(
            f"{len(parsed.chunks)} chunks were found by their texts in the messages, as no message "
            "marks its chunks: use rag_messages, or give documents="
        )
    if parsed.blank and parsed.chunks:
        notes.append(f"{parsed.blank} of the documents had no text, and were left out")
    if not parsed.chunks:
        notes.append(f"{_no_chunks(parsed)}, so the answer comes from the question alone")
    report["fallbacks"] = [*report.get("fallbacks", ()), *notes]
    return {
        "model_name": metadata.model,
        "model_provider": "ragcache",
        "finish_reason": metadata.finish_reason,
        "ragcache": {**report, "boundaries": list(parsed.sources)},
    }
