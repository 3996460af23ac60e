"""An attacker without a key opens more connections than the process may have open files.

It holds incomplete requests, reopens every one that is closed, and sends complete requests without
a key as fast as they are answered. Meanwhile a tenant's questions, each on its own connection, must
be answered in time, and the log must stay small. The attackers are separate processes, so that they
share no lock with the tenant's client.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event

import httpx

from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.running import Running
from bench.serve import documents, questions

FULL, SHORT = 75, 6  # seconds
DESCRIPTORS, HALVES = 300, 400
MOST_S = 2.0  # to a first token
LOG_BYTES = 64 << 10
_HALF = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\n"


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} s, {HALVES} half requests, {DESCRIPTORS} descriptors")
    seen, asked, slowest = Counter[str](), iter(questions() * 1000), 0.0
    apart = get_context("spawn")
    over, counted = apart.Event(), apart.SimpleQueue()
    with scratch() as folder, Running(folder, descriptors=DESCRIPTORS) as running:
        running.add([{"id": d.id, "text": d.text} for d in documents(20)])
        running.ask(next(asked))  # the first question of a store measures the machine
        before, until = running.log.stat().st_size, time.monotonic() + rounds
        attackers = [
            apart.Process(target=attack, args=(running.port, over, counted), daemon=True)
            for attack in (_hold, _knock)
        ]
        for attacker in attackers:
            attacker.start()
        while time.monotonic() < until:
            told = running.ask(next(asked))
            seen["answered" if told.status == 200 else f"WRONG: told {told.status}"] += 1
            slowest = max(slowest, told.ttft_s)
            seen["WRONG: not in time"] += told.ttft_s >= MOST_S
        over.set()
        found = dict(counted.get() for _ in attackers)
        for attacker in attackers:
            attacker.join()
        logged = running.log.stat().st_size - before
        if running.process.poll() is not None:
            outcome.violations.append("the service has ended")
    outcome.violations += [what for what, n in seen.items() for _ in range(n) if "WRONG" in what]
    if logged > LOG_BYTES + 512 * seen["answered"]:  # each answer has its line
        outcome.violations.append(f"{logged} bytes of log")
    outcome.figures += [
        f"{counts(+seen)}; the slowest first token took {slowest:.2f} s",
        f"{found['opened']} connections held or opened again, {found['asked']} requests without a "
        "key",
        f"{logged} bytes of log",
    ]
    return outcome


def _hold(port: int, over: Event, counted: SimpleQueue[tuple[str, int]]) -> None:
    """Keep HALVES half requests open; counts how many were opened for that."""
    held, opened = dict[int, socket.socket](), 0
    while not over.wait(0.05):
        while len(held) < HALVES and not over.is_set():
            try:
                one = socket.create_connection(("127.0.0.1", port), timeout=1)
                one.sendall(_HALF)
            except OSError:
                break
            held[one.fileno()] = one
            opened += 1
        for closed in select.select(held, [], [], 0)[0]:
            held.pop(closed).close()
    for one in held.values():
        one.close()
    counted.put(("opened", opened))


def _knock(port: int, over: Event, counted: SimpleQueue[tuple[str, int]]) -> None:
    """Ask without a key; counts how often."""
    asked = 0
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        while not over.is_set():
            try:
                client.get("/v1/stats")
                asked += 1
            except httpx.HTTPError:  # the connection was the oldest of those that wait
                over.wait(0.05)
    counted.put(("asked", asked))
