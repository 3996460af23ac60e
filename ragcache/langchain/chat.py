"""The chat model: answers over chunks whose KV is stored, with a report of what was reused."""

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
from ragcache.langchain.backend import ChatRequest, Finished
from ragcache.langchain.chunk_parsing import MATCHED, Turn, read
from ragcache.langchain.connection import Place, check_options
from ragcache.langchain.messages import RagCacheMessage, RagCacheMessageChunk
from ragcache.settings import Ratio
from ragcache.util.list_argument import require_list

#: What is asked of the model: a call may set it, and ``bind`` before it.
_OPTIONS = {"model", "mode", "ratio", "max_tokens", "temperature", "top_p", "seed", "timeout"}
#: Everything that a call may set.
_CALL = _OPTIONS | {"documents", "require_chunks", "stop"}
#: What LangChain binds for its traces.
_LANGCHAINS = {"ls_structured_output_format", "structured_output_format"}

_NO_TOOLS = (
    "ChatRagCache cannot {what}: a prompt is a prefix, chunks and a question, so that stored KV "
    "fits, and has no room for tools or schemas. {instead}"
)


class ChatRagCache(Place, BaseChatModel):
    """A model that answers from chunks, over a store in this process or a running service.

    ``store=`` or ``base_url=`` says where, as :class:`Place` has them.

    The last human message is the question. Chunks come from ``text-plain`` blocks
    (:func:`rag_messages` makes them), from several text parts of the last human message, from
    ``ToolMessage.artifact``, and from ``documents=`` at call or ``bind``; without any of these,
    texts of stored chunks are found in what was said, which the report then says. A chunk that is
    not stored yet is computed with its first question, and stored before the answer ends.

    An empty list of documents says that there are none: nothing is looked for, and the question is
    answered by itself, which the report's ``fallbacks`` say. ``require_chunks`` refuses a
    question without any, with PromptError.

    What else was said is not dropped: instructions, earlier turns and results of tools go before
    the question, as :attr:`ragcache.langchain.chunk_parsing.Turn.text` says. They are computed for
    every prompt; only chunks are reused. Tools cannot be called, nor images be seen.

    An answer's ``response_metadata["ragcache"]`` has the report: mode, TTFT, what was reused of
    each chunk, and by which ways their ``boundaries`` came. Options that are None are left to the
    settings of the store or service.
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
    require_chunks: bool = False  # a question over none is refused, not answered by itself

    model_config = ConfigDict(extra="forbid")

    _name: str = PrivateAttr(default="")  # what the model that answers calls itself

    @property
    def _llm_type(self) -> str:
        return "ragcache"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        place = {"store": str(self.store)} if self.base_url is None else {"base_url": self.base_url}
        return {**place, **{name: getattr(self, name) for name in _OPTIONS}}

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

    # What is traced of a call is said before its answer, so that the model's name must be known by
    # then: these open what answers first.
    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        self._name = self.backend.model_name()
        return super().generate(*args, **kwargs)

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        self._name = await (await self.opened()).amodel_name()
        return await super().agenerate(*args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[AIMessageChunk]:
        self._name = self.backend.model_name()
        yield from super().stream(*args, **kwargs)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        self._name = await (await self.opened()).amodel_name()
        async with aclosing(super().astream(*args, **kwargs)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def bind(self, **kwargs: Any) -> Any:
        """With these options at every call. TypeError for an unknown one."""
        check_options(kwargs, _CALL | _LANGCHAINS, type(self))
        return super().bind(**kwargs)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> NoReturn:
        """NotImplementedError: tools cannot be called."""
        instead = (
            "Call the tool in a step of the chain or graph, and give its documents to this model "
            "(examples/langchain/agent.py does), or choose tools with another model."
        )
        raise NotImplementedError(_NO_TOOLS.format(what="call tools", instead=instead))

    def with_structured_output(self, schema: Any, **kwargs: Any) -> NoReturn:
        """NotImplementedError: an answer is text."""
        instead = "Parse its text with an output parser, or give it to another model to shape."
        raise NotImplementedError(_NO_TOOLS.format(what="follow a schema", instead=instead))

    def get_token_ids(self, text: str) -> list[int]:
        """The text's tokens, by the tokenizer of the model that answers: nothing is added to it.

        Over a service, PromptError for a text that is longer than the service counts.
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
        """Tokens of the prompt that a call with these messages would make: its ``input_tokens``.

        Messages that do not end with a question are counted as far as they go. Tools cannot be
        given.
        """
        if tools:
            self.bind_tools(tools)
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages)
        turn = read(messages, documents)
        if not turn.ways:
            turn = turn.matched(self.backend.known())
        return self.backend.count(turn.wording, turn.chunks)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        turn = _turn(messages, kwargs)
        if not turn.ways:
            turn = turn.matched(self.backend.known())
        return _result(turn, *self.backend.ask(self._request(turn, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        turn, backend = _turn(messages, kwargs), await self.opened()
        if not turn.ways:
            turn = turn.matched(await backend.aknown())
        return _result(turn, *await backend.aask(self._request(turn, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        turn = _turn(messages, kwargs)
        if not turn.ways:
            turn = turn.matched(self.backend.known())
        with closing(self.backend.stream(self._request(turn, stop, kwargs))) as pieces:
            for piece in pieces:
                chunk = _piece(turn, piece)
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
        turn, backend = _turn(messages, kwargs), await self.opened()
        if not turn.ways:
            turn = turn.matched(await backend.aknown())
        async with aclosing(backend.astream(self._request(turn, stop, kwargs))) as pieces:
            async for piece in pieces:
                chunk = _piece(turn, piece)
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(
        self, turn: Turn, stop: Sequence[str] | None, given: dict[str, Any]
    ) -> ChatRequest:
        """What is asked: this call's options before the model's own. TypeError for unknown ones,
        PromptError for a question over no documents where some are required."""
        check_options(given, _CALL, type(self))
        required = given.get("require_chunks")
        if not turn.chunks and (self.require_chunks if required is None else required):
            raise PromptError(
                f"{_without(turn)}, and require_chunks refuses to answer from the question "
                "alone: give documents, or leave it out"
            )
        own = {name: getattr(self, name) for name in _OPTIONS}
        called = {name: value for name, value in given.items() if name in _OPTIONS}
        wanted = own | {name: value for name, value in called.items() if value is not None}
        stops = self.stop if stop is None else stop
        ends = () if stops is None else tuple(require_list(stops, "stop"))
        return ChatRequest(turn.text, turn.chunks, stop=ends, **wanted)


def _turn(messages: Sequence[BaseMessage], given: dict[str, Any]) -> Turn:
    return read(messages, given.get("documents"))


def _without(turn: Turn) -> str:
    """Of a turn without chunks: who says that there are none."""
    if turn.ways:
        return f"there are no documents: {' and '.join(turn.ways)} held none that has text"
    return "there are no documents: no message brought any, and none was found in what was said"


def _result(turn: Turn, text: str, finished: Finished) -> ChatResult:
    metadata = _metadata(turn, finished)
    message = RagCacheMessage(
        content=text, response_metadata=metadata, usage_metadata=_usage(finished)
    )
    information = {"finish_reason": finished.finish_reason}
    output = {name: metadata[name] for name in ("model_name", "ragcache")}
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info=information)],
        llm_output=output,
    )


def _piece(turn: Turn, piece: str | Finished) -> ChatGenerationChunk:
    if isinstance(piece, str):
        return ChatGenerationChunk(message=RagCacheMessageChunk(content=piece))
    last = RagCacheMessageChunk(
        content="",
        response_metadata=_metadata(turn, piece),
        usage_metadata=_usage(piece),
        chunk_position="last",
    )
    information = {"finish_reason": piece.finish_reason}
    return ChatGenerationChunk(message=last, generation_info=information)


def _usage(finished: Finished) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=finished.input_tokens,
        output_tokens=finished.output_tokens,
        total_tokens=finished.input_tokens + finished.output_tokens,
        input_token_details=InputTokenDetails(cache_read=finished.cached_tokens),
    )


def _metadata(turn: Turn, finished: Finished) -> dict[str, Any]:
    """The report calls chunks as their givers do, and says how their boundaries came."""
    report = dict(finished.report)
    for name in ("chunks", "passages"):
        if len(entries := report.get(name, ())) == len(turn.chunks):
            report[name] = [
                {**entry, "id": entry["id"] if given.id is None else given.id}
                for entry, given in zip(entries, turn.chunks, strict=True)
            ]
    notes = []
    if MATCHED in turn.ways:
        notes.append(
            f"{len(turn.chunks)} chunks were found by their texts in what was said, as no message "
            "said where chunks begin: use rag_messages, or give documents="
        )
    if turn.blank and turn.chunks:
        notes.append(f"{turn.blank} of the documents given had no text, and were left out")
    if not turn.chunks:
        notes.append(f"{_without(turn)}, so the answer comes from the question alone")
    report["fallbacks"] = [*report.get("fallbacks", ()), *notes]
    return {
        "model_name": finished.model,
        "model_provider": "ragcache",
        "finish_reason": finished.finish_reason,
        "ragcache": {**report, "boundaries": list(turn.ways)},
    }
