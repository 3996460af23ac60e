"""A service in a thread with the contract of the real one, over a small store."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ragcache.errors import ConfigError, PromptError
from ragcache.langchain.backend import AnswerMetadata, ChatRequest
from ragcache.langchain.convert import InputChunk
from ragcache.langchain.local_backend import LocalBackend
from ragcache.rag import RagCache

KEY = "sk-test"


@dataclass
class Stub:
    """What it serves, and what it was asked. ``busy``: so many questions are sent away first."""

    url: str
    local: LocalBackend
    asked: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0


@contextmanager
def serve(cache: RagCache) -> Iterator[Stub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1", LocalBackend.open(cache))
    server.stub = stub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stub(self) -> Stub:
        return self.server.stub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        if self._welcome():
            self._send(200, {"data": [{"id": self.stub.local.cache.engine.name}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.asked.append(body)
        if not self._welcome():
            return
        if self.stub.busy:
            self.stub.busy -= 1
            self._send(503, {"error": {"message": "busy"}}, {"Retry-After": "0"})
            return
        try:
            pieces = self.stub.local.stream(_request(body))
            first = next(pieces)
        except (PromptError, ConfigError) as error:
            self._send(400, {"error": {"message": str(error)}})
            return
        told = (piece for part in ([first], pieces) for piece in part)
        if body["stream"]:
            self._stream(told)
        else:
            *texts, finished = told
            assert isinstance(finished, AnswerMetadata)
            message = {"role": "assistant", "content": "".join(map(str, texts))}
            choice = {"message": message, "finish_reason": finished.finish_reason}
            self._send(200, {"choices": [choice], **_rest(finished)})

    def _welcome(self) -> bool:
        if welcome := self.headers.get("Authorization") == f"Bearer {KEY}":
            return welcome
        self._send(401, {"error": {"message": "no such key"}})
        return False

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, told: Iterator[str | AnswerMetadata]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in told:
            if isinstance(piece, str):
                self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
            else:
                choice: dict[str, Any] = {"delta": {}, "finish_reason": piece.finish_reason}
                rest = _rest(piece)
                usage = rest.pop("usage")
                self._event({"choices": [choice], **rest})
                self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, body: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()


def _request(body: dict[str, Any]) -> ChatRequest:
    given = body["documents"]
    sampling = {k: body[k] for k in ("max_tokens", "temperature", "top_p", "seed") if k in body}
    return ChatRequest(
        tuple(body["messages"]),
        tuple(InputChunk(d["text"], d.get("id")) for d in given),
        stop=tuple(body.get("stop", ())),
        **sampling,
        **body.get("ragcache", {}),
    )


def _rest(finished: AnswerMetadata) -> dict[str, Any]:
    return {
        "model": finished.model,
        "ragcache": finished.report,
        "usage": {
            "prompt_tokens": finished.input_tokens,
            "completion_tokens": finished.output_tokens,
            "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
        },
    }
