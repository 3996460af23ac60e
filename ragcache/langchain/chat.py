"""The chat model: answers over chunks whose KV is stored, with a report of what was reused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from ragcache.langchain.backend import Finished, Request
from ragcache.langchain.boundaries import MATCHED, Turn, read
from ragcache.langchain.messages import RagCacheMessage, RagCacheMessageChunk
from ragcache.langchain.place import Place
from ragcache.settings import Ratio

#: What a call may set, and ``bind`` before it, besides ``stop`` and ``documents``.
_OPTIONS = {"model", "mode", "ratio", "max_tokens", "temperature", "top_p", "seed", "timeout"}


class ChatRagCache(Place, BaseChatModel):
    """A model that answers from chunks, over a store in this process or a running service.

    ``store=`` or ``base_url=`` says where, as :class:`Place` has them.

    The last human message is the question. Chunks come from ``text-plain`` blocks
    (:func:`rag_messages` makes them), from several text parts of the last human message, from
    ``ToolMessage.artifact``, and from ``documents=`` at call or ``bind``; without any of these,
    texts of stored chunks are found in what was said, which the report then says. A chunk that is
    not stored yet is computed with its first question, and stored before the answer ends.

    What else was said is not dropped: instructions, earlier turns and results of tools go before
    the question, as :attr:`ragcache.langchain.boundaries.Turn.text` says. They are computed for
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
        params = super()._get_ls_params(stop=stop or self.stop or None, **kwargs)
        params["ls_model_name"] = kwargs.get("model") or self.model or "ragcache"
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        turn = _turn(messages, kwargs)
        if not turn.chunks:
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
        if not turn.chunks:
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
        if not turn.chunks:
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
        if not turn.chunks:
            turn = turn.matched(await backend.aknown())
        async with aclosing(backend.astream(self._request(turn, stop, kwargs))) as pieces:
            async for piece in pieces:
                chunk = _piece(turn, piece)
                if run_manager and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(self, turn: Turn, stop: Sequence[str] | None, given: dict[str, Any]) -> Request:
        """What is asked: this call's options before the model's own. TypeError for unknown ones."""
        if unknown := given.keys() - _OPTIONS - {"documents"}:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: no option of ChatRagCache. There are "
                + ", ".join(sorted(_OPTIONS | {"documents", "stop"}))
            )
        own = {name: getattr(self, name) for name in _OPTIONS}
        called = {name: value for name, value in given.items() if name in _OPTIONS}
        wanted = own | {name: value for name, value in called.items() if value is not None}
        stops = tuple(self.stop or () if stop is None else stop)
        return Request(turn.text, turn.chunks, stop=stops, **wanted)


def _turn(messages: Sequence[BaseMessage], given: dict[str, Any]) -> Turn:
    return read(messages, given.get("documents") or ())


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
                {**entry, "id": given.id or entry["id"]}
                for entry, given in zip(entries, turn.chunks, strict=True)
            ]
    if MATCHED in turn.ways:
        note = (
            f"{len(turn.chunks)} chunks were found by their texts in what was said, as no message "
            "said where chunks begin: use rag_messages, or give documents="
        )
        report["fallbacks"] = [*report.get("fallbacks", ()), note]
    return {
        "model_name": finished.model,
        "model_provider": "ragcache",
        "finish_reason": finished.finish_reason,
        "ragcache": {**report, "boundaries": list(turn.ways)},
    }
