"""Response bodies and stream events of ``/v1/query`` and of OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ragcache.api.serialize import report_json

if TYPE_CHECKING:
    from ragcache.api.bridge import AnswerStream
    from ragcache.engine.base import ChunkEngine
    from ragcache.types import Answer


def usage(answer: Answer, *, flat: bool = False) -> dict[str, Any]:
    """OpenAI's ``usage`` object, with the number of ``chunks`` in the prompt. Cached tokens are
    those of chunks and other text whose KV was loaded from the store and not recomputed. ``flat``:
    the counts that the access log has."""
    report, prompt = answer.report, answer.report.prompt_tokens
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": len(answer.tokens)}
    if flat:
        return counts | {"cached_tokens": report.cached_tokens}
    return counts | {
        "total_tokens": prompt + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
        "chunks": len(report.chunks),
    }


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.stopped == "length" else "stop"


class QueryResponse:
    """Shapes answers of ``/v1/query``."""

    id_prefix = "query"

    def __init__(self, engine: ChunkEngine, id: str, trace: bool = False) -> None:
        self.engine, self.trace = engine, trace
        self.common = {
            "id": f"{self.id_prefix}-{id}",
            "created": int(time.time()),
            "model": engine.name,
        }

    def body(self, answer: Answer) -> dict[str, Any]:
        passages = [
            {
                "id": passage.chunk.id,
                "document": passage.chunk.document,
                "score": passage.score,
                "text": passage.chunk.text,
                "metadata": dict(passage.chunk.metadata),
            }
            for passage in answer.passages
        ]
        return {
            **self.common,
            "object": "ragcache.answer",
            "answer": answer.text,
            "finish_reason": _finish_reason(answer),
            "passages": passages,
            "usage": usage(answer),
            "ragcache": self.report(answer),
        }

    def report(self, answer: Answer) -> dict[str, Any]:
        return report_json(answer, self.engine, trace=self.trace)

    async def events(self, stream: AnswerStream) -> AsyncGenerator[dict[str, Any]]:
        async with aclosing(stream.pieces()) as pieces:
            if stream.no_chunks is not None:  # before any piece of such an answer
                yield {"delta": "", "no_chunks": stream.no_chunks}
            async for piece in pieces:
                yield {"delta": piece}
        assert stream.answer is not None
        yield self.body(stream.answer)


class ChatCompletionResponse(QueryResponse):
    """Shapes answers of ``/v1/chat/completions``."""

    id_prefix = "chatcmpl"

    def __init__(
        self, engine: ChunkEngine, id: str, trace: bool = False, *, include_usage: bool = False
    ) -> None:
        super().__init__(engine, id, trace)
        self.include_usage = include_usage
        self.common["system_fingerprint"] = self.engine.fingerprint.digest.hex()[:16]

    def body(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _finish_reason(answer),
        }
        return {
            **self.common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "ragcache": self.report(answer),
        }

    async def events(self, stream: AnswerStream) -> AsyncGenerator[dict[str, Any]]:
        first = self._chunk({"role": "assistant", "content": "", "refusal": None})
        if stream.no_chunks is not None:
            first["ragcache"] = {"no_chunks": stream.no_chunks}
        yield first
        async with aclosing(stream.pieces()) as pieces:
            async for piece in pieces:
                yield self._chunk({"content": piece})
        answer = stream.answer
        assert answer is not None
        yield self._chunk({}, _finish_reason(answer)) | {"ragcache": self.report(answer)}
        if self.include_usage:
            yield self._chunk(None) | {"usage": usage(answer)}

    def _chunk(self, delta: dict[str, Any] | None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        event = {
            **self.common,
            "object": "chat.completion.chunk",
            "choices": [] if delta is None else [choice],
        }
        return event | ({"usage": None} if self.include_usage else {})
