"""Space is reclaimed after puts and deletes of random sizes, and a blocking reader is reported.

The data file must be at most twice its live data, plus what is not worth a compaction. The store
checks that at intervals and may exceed the bound in between, so it is measured right after a check.
A reader in another process that does not end prevents freed space from being reused: the log must
say so within a minute.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from pathlib import Path

import torch

from bench.reliability.child import Child, Send
from bench.reliability.outcome import Outcome, scratch
from bench.reliability.samples import MODEL, put
from ragcache.store import ChunkKey, DiskStore
from ragcache.store.disk.store import _CHECK_EVERY, WORTH_COMPACTING
from ragcache.types import ChunkKV

FULL, SHORT = 1000, 60  # cycles
MOST_LIVE = 60  # chunks
NOTICED_S = 60.0


def put_of(store: DiskStore, number: int, tokens: int) -> None:
    """A chunk of 6 KB a token, all zeros: it is the space that counts."""
    ids = tuple(range(number, number + tokens))
    half = torch.zeros((6, 8, tokens, 16)).unbind()
    store.put(ChunkKey(MODEL, ids), ChunkKV(ids, half, half))


def stay(path: Path, send: Send) -> None:
    """A reader that goes to sleep in the middle of a read."""
    with DiskStore(path, readonly=True) as store, store.tables.read():
        send("reading")
        signal.pause()


class Heard(logging.Handler):
    """Whether a warning about a reader was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told = ""

    def emit(self, record: logging.LogRecord) -> None:
        if "has been open for" in record.getMessage():
            self.told = record.getMessage()


def cycles(path: Path, rounds: int, rng: random.Random, outcome: Outcome) -> None:
    """Put one and delete another, ``rounds`` times, until nothing is left to look at."""
    live: list[tuple[int, int]] = []
    most = changes = wanted = 0

    def changed(store: DiskStore) -> None:
        nonlocal most, changes
        changes += 1
        size = store.tables.file.stat().st_size
        most = max(most, size)
        if changes % _CHECK_EVERY == 0 and size > 2 * store.tables.live_bytes() + WORTH_COMPACTING:
            outcome.violations.append("the file is larger than twice what is live, + 16 MB")

    with DiskStore(path, layout="records") as store:
        for number in range(rounds):
            if number % 50 == 0:
                wanted = rng.choice([2, 10, MOST_LIVE])  # it fills, and it empties
            tokens = round(2 ** rng.uniform(3, 9))  # 50 KB to 3 MB
            put_of(store, number, tokens)
            changed(store)
            live.append((number, tokens))
            while len(live) > wanted:
                first, count = live.pop(rng.randrange(len(live)))
                store.delete(ChunkKey(MODEL, tuple(range(first, first + count))))
                changed(store)
        name = store.tables.file.parent.name
        compactions = int(name.removeprefix("data-")) if name.startswith("data-") else 0
        outcome.violations += [f"verify: {what}" for what in store.verify().values()]
        outcome.figures.append(
            f"{changes} changes, {compactions} compactions by itself, file at most "
            f"{most / 1e6:.0f} MB, at last {store.tables.file.stat().st_size / 1e6:.0f} MB with "
            f"{store.tables.live_bytes() / 1e6:.1f} MB live"
        )


def held(path: Path, outcome: Outcome) -> None:
    """Write once a second, until the log reports the reader."""
    DiskStore(path).close()
    heard = Heard()
    logging.getLogger("ragcache").addHandler(heard)
    try:
        with Child(lambda send: stay(path, send)) as child, DiskStore(path) as store:
            child.line()
            began = time.monotonic()
            while not heard.told and time.monotonic() < began + NOTICED_S:
                put(store, 0, 1)
                time.sleep(0.2)
            waited = time.monotonic() - began
        if str(child.pid) not in heard.told:
            outcome.violations.append(f"a reader stayed for {waited:.0f} s, and no log says so")
        outcome.figures.append(f"a reader that stayed was named in the log after {waited:.1f} s")
    finally:
        logging.getLogger("ragcache").removeHandler(heard)


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} cycles")
    with scratch() as folder:
        cycles(folder / "store", rounds, random.Random(seed), outcome)
        if rounds > SHORT:  # it takes half a minute
            held(folder / "held", outcome)
    return outcome
