"""Requests without end, with documents that come and go: ``python -m bench.reliability soak``.

Clients ask, streamed and whole, by retrieval and with chunks of their own, and some hang up; beside
them one adds and deletes documents. Any answer but 200 is a violation, and so are memory,
descriptors or threads at the end that are well above those after the first tenth.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from bench.reliability.outcome import Outcome, counts, scratch
from bench.serve import documents, questions, serving

FULL, SHORT = 10_000, 200  # requests
CLIENTS = 4
_MORE_MIB = 64  # that memory may grow by, for good


def run(rounds: int, seed: int) -> Outcome:
    outcome, seen, lock = (
        Outcome(f"{rounds} requests, {CLIENTS} clients"),
        Counter[str](),
        threading.Lock(),
    )
    texts, asked = documents(120), questions()
    with (
        scratch() as folder,
        serving(folder / "store", ratio=0.15, log_text=False) as (service, first),
    ):
        first.post("/v1/documents", json=_body(texts[:40])).raise_for_status()
        left, over = [rounds], threading.Event()

        def client() -> httpx.Client:
            url, headers = first.base_url, first.headers
            return httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False)

        def ask(number: int) -> None:
            rng = random.Random(f"{seed}/{number}")
            with client() as mine:
                while True:
                    with lock:
                        if left[0] <= 0:
                            return
                        left[0] -= 1
                        done = rounds - left[0]
                    what = _ask(mine, rng, asked, [d.text[:200] for d in texts[40:80]])
                    with lock:
                        seen[what] += 1
                        if done == rounds // 10 or done == rounds:
                            marks.append(_held())

        def change() -> None:
            rng = random.Random(f"{seed}/change")
            with client() as mine:
                while not over.wait(0.1):
                    one = rng.choice(texts[80:])
                    what = "deleted" if rng.random() < 0.5 else "added"
                    if what == "deleted":
                        response = mine.delete(f"/v1/documents/{one.id}")
                    else:
                        response = mine.post("/v1/documents", json=_body([one]))
                    fine = (
                        response.status_code == 200
                        or what == "deleted"
                        and response.status_code == 404
                    )
                    with lock:
                        seen[what if fine else f"WRONG: {what}: {response.text[:200]}"] += 1

        marks: list[tuple[int, int, int]] = []
        changing = threading.Thread(target=change)
        changing.start()
        asking = [threading.Thread(target=ask, args=(n,)) for n in range(CLIENTS)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        over.set()
        changing.join()
        waiting, active = service.scheduler.depth()
        text = first.get("/metrics").text
    for what, n in seen.items():
        if what.startswith("WRONG"):
            outcome.violations += n * [what]
    if (waiting, active) != (0, 0):
        outcome.violations.append(f"{waiting} wait and {active} are under way at the end")
    (mib, files, threads), (mib_end, files_end, threads_end) = marks[0], marks[-1]
    if mib_end > mib + _MORE_MIB:
        outcome.violations.append(f"memory grew from {mib} to {mib_end} MiB")
    if files_end > files + 2 * CLIENTS or threads_end > threads + 8:
        outcome.violations.append(
            f"{files} descriptors, {threads} threads grew to {files_end}, {threads_end}"
        )
    failed = sum('status="5' in line for line in text.splitlines())
    outcome.violations += failed * ["a route has answered 5xx"]
    outcome.figures += [
        counts(seen),
        f"after a tenth {mib} MiB, {files} descriptors, {threads} threads; "
        f"at the end {mib_end} MiB, {files_end} descriptors, {threads_end} threads",
    ]
    return outcome


def _ask(client: httpx.Client, rng: random.Random, asked: list[str], texts: list[str]) -> str:
    """One request; what it was, or what was wrong."""
    kind = rng.choices(("whole", "streamed", "chat", "hung up"), (4, 4, 2, 1))[0]
    body: dict[str, Any] = {
        "question": rng.choice(asked),
        "max_tokens": 8,
        "stream": kind != "whole",
    }
    path = "/v1/query"
    if kind == "chat":
        message = {"role": "user", "content": rng.choice(asked)}
        given = rng.sample(texts, 3)
        body = {"model": "ragcache", "messages": [message], "documents": given, "max_tokens": 8}
        path = "/v1/chat/completions"
    with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            return f"WRONG: {response.status_code}: {response.read()[:200].decode()}"
        if kind == "hung up":
            return kind
        text = response.read().decode()
    if kind == "streamed" and not text.endswith("data: [DONE]\n\n"):
        return f"WRONG: a stream ended with {text[-200:]}"
    return kind


def _body(texts: list[Any]) -> dict[str, Any]:
    return {"documents": [{"id": d.id, "text": d.text} for d in texts]}


def _held() -> tuple[int, int, int]:
    """MiB that are resident, open descriptors, and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = (pages * resource.getpagesize()) >> 20
    return mib, len(os.listdir("/proc/self/fd")), threading.active_count()
