"""The service that the page speaks to, as small as can be: a real RagCache, one user, no key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ragcache.api.page import STATIC
from ragcache.api.reporting import report_json, store_json
from ragcache.errors import RagCacheError
from ragcache.pipeline import RagCache
from ragcache.types import Document

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


@contextmanager
def served(cache: RagCache) -> Iterator[str]:
    """Its address, for as long as the ``with`` lasts."""
    turn = threading.Lock()  # the engine runs one question at a time

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/stats":
                self.answer(store_json(cache.chunks))
            elif self.path == "/v1/documents":
                entries = cache.documents()
                fields = ("id", "chunks", "pinned", "expires")
                self.answer({"data": [{f: getattr(e, f) for f in fields} for e in entries]})
            else:
                name = self.path.removeprefix("/demo").removeprefix("/") or "index.html"
                text = (STATIC / name).read_bytes()
                self.send(text, f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with turn:
                if self.path == "/v1/documents":
                    cache.add([Document(**document) for document in asked["documents"]])
                    return self.answer({})
                try:
                    stream = cache.stream(asked["question"], mode=asked["mode"])
                except RagCacheError as error:
                    return self.answer({"error": {"message": str(error)}}, 400)
                self.send(None, "text/event-stream")
                for piece in stream:
                    self.event({"delta": piece})
                answer = stream.answer
                self.event(
                    {
                        "answer": {"text": answer.text, "stopped": answer.stopped},
                        "ragcache": report_json(answer, cache.engine, trace=True),
                    }
                )
                self.wfile.write(b"data: [DONE]\n\n")

        def event(self, data: Any) -> None:
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

        def answer(self, data: Any, status: int = 200) -> None:
            self.send(json.dumps(data).encode(), "application/json", status)

        def send(self, body: bytes | None, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
