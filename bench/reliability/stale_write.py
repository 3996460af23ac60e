"""Jobs, deletes and replacements over HTTP with SIGKILL: the last acknowledged write wins.

A job of many documents is accepted, some of them are replaced and deleted while it runs, and the
service is killed at a random time or ended with SIGTERM, repeatedly on the same store. In the end
all jobs finish, and every document must have the text of its last acknowledged write.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import httpx

from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.running import Running

FULL, SHORT = 20, 2  # times that the service is ended
NAMES = 120  # documents of a job
ENDS_S = 10.0  # from SIGTERM to the end
_LONGEST_S = 3.0  # that the service is written to
_WAIT_S = 300.0

#: Of a document the texts that may be there, None for none.
Expected = dict[str, set[str | None]]


class Writer:
    """Writes, and notes what was acknowledged; until it is, a write may be there or not."""

    def __init__(self, seed: int) -> None:
        self.rng, self.number = random.Random(seed), 0
        self.expected: Expected = {f"d{number:03}": {None} for number in range(NAMES)}
        self.seen = Counter[str]()

    def write(self, client: httpx.Client, *, job: bool) -> None:
        """A job, if that is asked for, and then single documents until the service is gone."""
        try:
            if job:
                self._post(client, "/v1/jobs", list(self.expected))
            while True:
                name = self.rng.choice(list(self.expected))
                if self.rng.random() < 0.5:
                    self._post(client, "/v1/documents", [name])
                else:
                    self._delete(client, name)
        except httpx.TransportError:
            return

    def _post(self, client: httpx.Client, path: str, names: list[str]) -> None:
        self.number += 1
        texts = {name: f"Text {self.number} of {name}." for name in names}
        for name, text in texts.items():
            self.expected[name] = self.expected[name] | {text}
        body = {"documents": [{"id": name, "text": text} for name, text in texts.items()]}
        if client.post(path, json=body).is_success:
            self.expected |= {name: {text} for name, text in texts.items()}
            self.seen["jobs" if path.endswith("jobs") else "replaced"] += 1

    def _delete(self, client: httpx.Client, name: str) -> None:
        self.expected[name] = self.expected[name] | {None}
        status = client.delete(f"/v1/documents/{name}").status_code
        if status in (200, 404):
            self.expected[name] = {None}
            self.seen["deleted" if status == 200 else "not there"] += 1


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} ends of the service, jobs of {NAMES} documents")
    writer, rng, slowest = Writer(seed), random.Random(seed), 0.0
    with scratch() as folder:
        for turn in range(rounds):
            with Running(folder) as running, running.client(seconds=30.0) as client:
                politely = turn % 4 == 3
                end = threading.Timer(
                    rng.uniform(0.1, _LONGEST_S), running.stop if politely else running.kill
                )
                end.start()
                writer.write(client, job=turn % 3 == 0)
                end.join()
                if politely:
                    slowest = max(slowest, running.ended_s())
        with Running(folder) as running, running.client() as client:
            states, found = _ended(client), _texts(client)
    outcome.violations += [
        f"of {name} an acknowledged write is undone"
        for name, may_be in writer.expected.items()
        if found.get(name) not in may_be
    ]
    outcome.violations += [f"a job is {state} at the end" for state in states if state != "done"]
    if slowest > ENDS_S:
        outcome.violations.append(f"SIGTERM took {slowest:.1f} s")
    outcome.figures += [
        f"acknowledged: {counts(writer.seen)}",
        f"{states['done']} jobs done in the end, {len(found)} documents of one acknowledged text",
        f"SIGTERM took {slowest:.1f} s at most",
    ]
    return outcome


def _ended(client: httpx.Client) -> Counter[str]:
    """The states of all jobs, once they have ended."""
    until = time.monotonic() + _WAIT_S
    while True:
        states = Counter(job["state"] for job in client.get("/v1/jobs").json()["data"])
        if not states["queued"] + states["running"] or time.monotonic() > until:
            return states
        time.sleep(0.2)


def _texts(client: httpx.Client) -> dict[str, str]:
    """Text by document; each is one chunk."""
    found = client.get("/v1/texts", params={"limit": 1000}).json()["data"]
    return {one["id"].partition("#")[0]: one["text"] for one in found}
