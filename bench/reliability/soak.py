"""A soak test under load with changing documents: ``python -m bench.reliability soak``.

Clients ask, with and without streaming, by retrieval and with given chunks, and some disconnect.
Meanwhile another client adds and deletes documents. Any status but 200 is a violation, and so are
memory, file descriptors or threads at the end that are well above those after the first tenth.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.reliability.outcome import Outcome, counts, scratch
from bench.serve import documents, questions, serving
from ragcache.api.service import Service
from ragcache.types import Document

FULL, SHORT = 10_000, 200  # requests
CLIENTS = 4
PAUSE = 0.1  # seconds between one change of the documents and the next
_MORE_MIB = 64  # that memory may grow by, for good
_KINDS = {"whole": 4, "streamed": 4, "chat": 2, "hung up": 1}


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} requests, {CLIENTS} clients")
    texts = documents(120)
    third = len(texts) // 3
    with (
        scratch() as folder,
        serving(folder / "store", ratio=0.15, log_text=False) as (service, client),
    ):
        client.post("/v1/documents", json=_body(texts[:third])).raise_for_status()
        chunks = [document.text[:200] for document in texts[third : 2 * third]]
        asking = _Clients(client, questions(), chunks, rounds, seed)
        over = threading.Event()
        with ThreadPoolExecutor() as pool:
            changing = pool.submit(_change, client, texts[2 * third :], seed, over)
            clients = [pool.submit(asking.ask, number) for number in range(CLIENTS)]
            seen = sum((one.result() for one in clients), Counter[str]())
            over.set()
            seen += changing.result()
        waiting, active = _wait_until_idle(service)
        metrics = client.get("/metrics").text
    for what, n in seen.items():
        if what.startswith("WRONG"):
            outcome.violations += n * [what]
    if (waiting, active) != (0, 0):
        outcome.violations.append(f"{waiting} wait and {active} are under way at the end")
    failed = sum('status="5' in line for line in metrics.splitlines())
    outcome.violations += failed * ["a route has answered 5xx"]
    first, last = asking.marks
    outcome.violations += last.above(first)
    outcome.figures += [counts(seen), f"after a tenth {first}; at the end {last}"]
    return outcome


@dataclass(frozen=True, slots=True)
class _Resources:
    """The resources in use by this process, which runs the service and its clients."""

    mib: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> _Resources:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mib = (pages * resource.getpagesize()) >> 20
        return cls(mib, len(os.listdir("/proc/self/fd")), threading.active_count())

    def above(self, before: _Resources) -> list[str]:
        """What has grown beyond the noise of clients that come and go."""
        grown = {
            "MiB": self.mib > before.mib + _MORE_MIB,
            "descriptors": self.descriptors > before.descriptors + 2 * CLIENTS,
            "threads": self.threads > before.threads + 2 * CLIENTS,
        }
        return [f"{what}: from {before} to {self}" for what, more in grown.items() if more]

    def __str__(self) -> str:
        return f"{self.mib} MiB, {self.descriptors} descriptors, {self.threads} threads"


class _Clients:
    """Clients that share out ``rounds`` requests, and what is held after a tenth and at the end."""

    def __init__(
        self, like: httpx.Client, asked: list[str], chunks: list[str], rounds: int, seed: int
    ) -> None:
        self.like, self.asked, self.chunks = like, asked, chunks
        self.rounds, self.seed = rounds, seed
        self.marks: list[_Resources] = []
        self._begun = 0
        self._lock = threading.Lock()

    def ask(self, number: int) -> Counter[str]:
        """One client's requests: how many there were of each kind, and of each violation."""
        rng = random.Random(f"{self.seed}/{number}")
        seen = Counter[str]()
        with _another(self.like) as client:
            while self._next():
                seen[self._one(client, rng)] += 1
        return seen

    def _next(self) -> bool:
        with self._lock:
            if self._begun == self.rounds:
                return False
            self._begun += 1
            if self._begun in (max(1, self.rounds // 10), self.rounds):
                self.marks.append(_Resources.now())
            return True

    def _one(self, client: httpx.Client, rng: random.Random) -> str:
        (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        question = rng.choice(self.asked)
        path, body = "/v1/query", {"question": question, "max_tokens": 8, "stream": kind != "whole"}
        if kind == "chat":
            message = {"role": "user", "content": question}
            given = rng.sample(self.chunks, 3)
            body = {"model": "ragcache", "messages": [message], "documents": given, "stream": True}
            path, body = "/v1/chat/completions", {**body, "max_tokens": 8}
        with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return f"WRONG: {response.status_code}: {response.read()[:200].decode()}"
            if kind == "hung up":
                return kind
            text = response.read().decode()
        if body["stream"] and not text.endswith("data: [DONE]\n\n"):
            return f"WRONG: a stream ended with {text[-200:]}"
        return kind


def _change(
    like: httpx.Client, texts: list[Document], seed: int, over: threading.Event
) -> Counter[str]:
    """Adds and deletes documents until it is over."""
    rng = random.Random(f"{seed}/change")
    seen = Counter[str]()
    with _another(like) as client:
        while not over.wait(PAUSE):
            one = rng.choice(texts)
            if rng.random() < 0.5:
                what, fine = "deleted", {200, 404}
                response = client.delete(f"/v1/documents/{one.id}")
            else:
                what, fine = "added", {200}
                response = client.post("/v1/documents", json=_body([one]))
            right = response.status_code in fine
            seen[what if right else f"WRONG: {what}: {response.text[:200]}"] += 1
    return seen


def _wait_until_idle(service: Service) -> tuple[int, int]:
    """(waiting, under way) once the last client that hung up has been noticed: both 0, or after
    five seconds whatever is left."""
    deadline = time.monotonic() + 5
    while any(service.scheduler.depth()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return service.scheduler.depth()


def _another(like: httpx.Client) -> httpx.Client:
    """A client of one's own with the address and key of ``like``."""
    return httpx.Client(base_url=like.base_url, headers=like.headers, timeout=120, trust_env=False)


def _body(texts: list[Document]) -> dict[str, Any]:
    return {"documents": [{"id": d.id, "text": d.text} for d in texts]}
