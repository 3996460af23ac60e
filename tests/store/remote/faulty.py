"""A proxy for an S3 server that injects faults of networks and servers."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = "timeout", "reset", "500", "truncated", "wrong bytes"
STALL_S = 0.8  # longer than the tests' clients wait


class Faulty(ThreadingHTTPServer):
    """Passes requests on to the server at ``url``; does one of ``kinds`` to a share of them.

    ``left`` faults are injected in all; ``done`` counts them by kind.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(url).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.kinds: tuple[str, ...] = FAULTS
        self.share, self.left = 0.0, 0
        self.done: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self._random, self._lock = random.Random(0), threading.Lock()

    def fault(self) -> str | None:
        """What to do to the next request."""
        with self._lock:
            if not self.left or self._random.random() >= self.share:
                return None
            self.left -= 1
            kind = self._random.choice(self.kinds)
            self.done[kind] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Range") or ""))
        fault = self.server.fault()
        if fault == "timeout":
            time.sleep(STALL_S)
        if fault in ("timeout", "reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if fault == "500":
            self.reply(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        behind = HTTPConnection(self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        found = behind.getresponse()
        data = bytearray(found.read())
        behind.close()
        if fault == "wrong bytes" and data and self.command == "GET":
            data[min(20, len(data) // 2)] ^= 1  # of a header, or of a layer
        kept = {k: v for k, v in found.getheaders() if k not in ("Connection", "Transfer-Encoding")}
        if fault == "truncated" and data:
            self.reply(found.status, kept, bytes(data), cut=len(data) // 2)
        else:
            self.reply(found.status, kept, bytes(data))

    def reply(
        self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status)
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def faulty(url: str) -> Iterator[Faulty]:
    """The proxy, for as long as the ``with`` lasts; without faults at first."""
    with Faulty(url) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
