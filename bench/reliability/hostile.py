"""Requests of an attacker, with or without a key, that try to deny service to others."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from bench.reliability.running import HOSTILE, Running

Attack = Callable[[Running], str]  # what it came to

_MIB = 1 << 20
_MOST = 4 * _MIB - 1024  # a body that is just taken
_WORDS = "the mill on the river grinds no more and the boats were sold in Oslo last May".split()
_EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\u200d"
_LONGEST_S = 20.0  # that a request is waited for


def prose(size: int) -> str:
    rng, found = random.Random(1), list[str]()
    length = 0
    while length < size:
        sentence = " ".join(rng.choices(_WORDS, k=rng.randint(5, 20))).capitalize() + ". "
        found.append(sentence + "\n\n" * (rng.random() < 0.1))
        length += len(found[-1])
    return "".join(found)[:size]


def filled(text: str, size: int) -> str:
    """``text`` over and over, of so many bytes of UTF-8 at most."""
    return text * (size // len(text.encode()))


@dataclass(frozen=True, slots=True)
class Post:
    """One body, sent so many times at once."""

    path: str
    body: Callable[[int], bytes]  # of its number
    times: int = 1

    def __call__(self, running: Running) -> str:
        bodies = [self.body(number) for number in range(self.times)]
        with ThreadPoolExecutor(self.times) as pool:
            found = list(pool.map(partial(self._send, running), bodies))
        return ", ".join(f"{found.count(one)} x {one}" for one in sorted(set(found)))

    def _send(self, running: Running, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        try:
            with running.client(HOSTILE, _LONGEST_S) as client:
                return str(client.post(self.path, content=body, headers=headers).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__


def post(path: str, body: Any, times: int = 1) -> Post:
    """``body``: the JSON of it, or what makes it of a number."""
    made = body if callable(body) else lambda _: body
    return Post(path, lambda number: json.dumps(made(number)).encode(), times)


def document(text: str, **metadata: str) -> dict[str, Any]:
    return {"id": "hostile", "text": text, "metadata": metadata}


def documents(*texts: str, **metadata: str) -> dict[str, Any]:
    made = [document(text, **metadata) | {"id": f"h{at}"} for at, text in enumerate(texts)]
    return {"documents": made}


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "ragcache", "messages": [{"role": "user", "content": content}], **more}


def halves(running: Running, count: int, text: bytes, *, rests: bytes = b"") -> str:
    """Connections that send the beginning of a request, and a byte of the rest each second."""
    held = list[socket.socket]()
    until = time.monotonic() + 10.0
    try:
        for _ in range(count):
            held.append(socket.create_connection(("127.0.0.1", running.port), timeout=5))
            held[-1].sendall(text)
        while time.monotonic() < until:
            time.sleep(1.0)
            for one in held if rests else ():
                try:
                    one.send(rests)
                except OSError:
                    pass
    except OSError as error:
        return f"{len(held)} held, then {type(error).__name__}"
    finally:
        for one in held:
            one.close()
    return f"{count} held"


def cut_off(running: Running, count: int = 200) -> str:
    """Bodies of which half is sent."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as one:
            one.sendall(_head(HOSTILE, 2 * _MIB))
            one.sendall(b" " * (1 << 16))
    return f"{count} cut off"


def get(path: str, times: int, running: Running, key: str | None = HOSTILE) -> str:
    with running.client(key, _LONGEST_S) as client:
        found = [client.get(path).status_code for _ in range(times)]
    return ", ".join(f"{found.count(one)} x {one}" for one in sorted(set(found)))


def _head(key: str, length: int) -> bytes:
    return (
        "POST /v1/documents HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


_HALF = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\n"
_LONE = "\ud800 \udfff"


def attacks() -> dict[str, Attack]:
    """By what they are; made anew for every call, since some are large."""
    add, job, query = "/v1/documents", "/v1/jobs", "/v1/query"
    chats, chunks, count = "/v1/chat/completions", "/v1/chunks", "/v1/tokenize"
    words = filled("word ", _MIB)
    system = [{"role": "system", "content": "a" * _MOST}, {"role": "user", "content": "Who?"}]
    return {
        "document, 1 MiB of a letter": post(add, documents("a" * _MIB)),
        "document, 64 KiB of joined emoji": post(add, documents(filled(_EMOJI, 64 << 10))),
        "document, 1 MiB of a word": post(add, documents(words)),
        "document, 1 MiB of prose": post(add, documents(prose(_MIB))),
        "document, 1 MiB of metadata": post(
            add, documents(words, **{f"m{n}": words[: _MIB // 100] for n in range(100)})
        ),
        "document, 1 MiB in one chunk": post(add, documents(words, ragcache="whole")),
        "Markdown, 1 MiB of brackets": post(add, documents("[" * _MIB, format="markdown")),
        "Markdown, 1 MiB of fences": post(
            add, documents(filled("```\n~~~\n> - x\n", _MIB), format="markdown")
        ),
        "10,000 documents": post(add, documents(*(f"Text {n}." for n in range(10_000)))),
        "job, 1 MiB of a letter": post(job, documents("a" * _MIB)),
        "job, 3 MiB of prose": post(job, documents(prose(3 * _MIB))),
        "job, 3 MiB of prose, no index": post(job, documents(prose(3 * _MIB)) | {"index": False}),
        "100 jobs": post(job, lambda n: documents(f"Text of {n}. {words[:9999]}"), 100),
        "question, 4 MiB": post(query, {"question": "a" * _MOST}),
        "question, as long as may be tokenised": post(query, {"question": "ab " * 8000}),
        "system message, 4 MiB": post(chats, chat("Who?") | {"messages": system}),
        "300,000 wrong messages": post(chats, {"model": "ragcache", "messages": [{}] * 300_000}),
        "300,000 wrong entries of metadata": post(
            add,
            {
                "documents": [
                    {"id": "a", "text": "A."} | {"metadata": dict.fromkeys(range(300_000), 1)}
                ]
            },
        ),
        "100,000 documents in a chat": post(chats, chat("Who?", documents=["a"] * 100_000)),
        "50,000 parts of a message": post(chats, chat([{"type": "text", "text": "a"}] * 50_000)),
        "60 additions at once": post(
            add, lambda n: documents(*(f"{n} {k} {words[:500]}" for k in range(40))), 60
        ),
        "200 questions at once": post(query, {"question": "Who was it?", "max_tokens": 400}, 200),
        "10,000 chunks": post(chunks, {"chunks": [f"Chunk {n}" for n in range(10_000)]}),
        "chunk, 1 MiB": post(chunks, {"chunks": [words]}),
        "400 idle halves of requests": partial(halves, count=400, text=_HALF),
        "100 slow bodies": partial(halves, count=100, text=_head(HOSTILE, _MIB), rests=b" "),
        "100 slow headers": partial(halves, count=100, text=_HALF, rests=b"a"),
        "200 uploads cut off": cut_off,
        "JSON, 2 MiB of brackets": Post(query, lambda _: b"[" * (2 * _MIB)),
        "JSON, 1 MiB of brackets in a field": Post(
            chats, lambda _: b'{"metadata":' + b"[" * (_MIB // 2) + b"]" * (_MIB // 2) + b"}"
        ),
        "JSON, 4,000,000 digits": Post(query, lambda _: b'{"seed":' + b"9" * 4_000_000 + b"}"),
        "JSON, 200,000 unknown fields": Post(
            query, lambda _: json.dumps({f"f{n}": n for n in range(200_000)}).encode()
        ),
        "17 texts that end an answer": post(query, {"question": "Who?", "stop": ["a"] * 17}),
        "500,000 texts that end an answer": post(query, {"question": "?", "stop": ["a"] * 500_000}),
        "lone surrogates in every field": post(
            chats,
            {f: _LONE for f in ("model", "user", "stop", "documents", "metadata")}
            | {"messages": [{"role": _LONE, "content": _LONE}]},
        ),
        "random:seed=10^23": post(query, {"question": "Who?", "mode": f"random:seed={10**23}"}),
        "top_k of 10^300": post(query, {"question": "Who?", "top_k": 10**300}),
        "top_k of 1000, neighbours of 100": post(
            query, {"question": "Who?", "top_k": 1000, "neighbours": 100}, 20
        ),
        "id of 3 MiB": post(add, {"documents": [{"id": "i" * 3 * _MIB, "text": "A text."}]}),
        "/demo/ and 256 letters": partial(get, "/demo/" + "a" * 256, 500, key=None),
        "2,000 requests without a key": partial(get, "/v1/stats", 2_000, key=None),
        "text to tokenise, as long as may be": post(count, {"text": "ab " * 10_000}, 20),
        "text to tokenise, 4 MiB": post(count, {"text": "a" * _MOST}, 4),
    }
