"""One process writes and four read concurrently: no reader may see a wrong bit.

Every read must be a miss or the complete KV of one write, and never of an older version than one
that the reader has seen. The writer puts, replaces, deletes, converts and compacts, mostly small
chunks.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.reliability.child import Child, Send
from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.samples import Wrong, chunk_key, put, unsound, version_of
from ragcache.errors import StoreError
from ragcache.store import DiskStore, Miss
from ragcache.store.disk.store import Layout

FULL, SHORT = 300, 1  # seconds
READERS = 4
CHUNKS = 12


def write(path: Path, until: float, seed: str, send: Send) -> None:
    rng, done, expected = random.Random(seed), Counter[str](), dict[int, int | None]()
    layouts: tuple[Layout, ...] = ("records", "files")
    kinds = {"put": 20, "delete": 5, "convert": 1, "compact": 1}
    version = 0
    with DiskStore(path) as store:
        while time.monotonic() < until:
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            version, number = version + 1, rng.randrange(CHUNKS)
            work: dict[str, Callable[[], object]] = {
                "put": partial(put, store, number, version),
                "delete": partial(store.delete, chunk_key(number)),
                "convert": partial(store.convert, rng.choice(layouts)),
                "compact": store.compact,
            }
            work[kind]()
            if kind in ("put", "delete"):
                expected[number] = version if kind == "put" else None
            done[kind] += 1
    send(json.dumps([done, expected]))


def read(path: Path, until: float, seed: str, send: Send) -> None:
    rng, seen, newest = random.Random(seed), Counter[str](), dict[int, int]()
    with DiskStore(path, readonly=True) as store:
        while time.monotonic() < until:
            number = rng.randrange(CHUNKS)
            try:
                found = store.get(chunk_key(number))
                if isinstance(found, Miss):
                    seen[f"miss: {found.reason}"] += 1
                    continue
                version = version_of(found)
                seen["right" if version >= newest.get(number, 0) else "WRONG: older"] += 1
                newest[number] = version
            except Wrong:
                seen["WRONG: of no put"] += 1
            except StoreError as error:
                seen[f"WRONG: StoreError: {error}".replace(str(path), "STORE")] += 1
    send(json.dumps(seen))


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} s, 1 writer, {READERS} readers")
    with scratch() as folder, ExitStack() as stack:
        path = folder / "store"
        DiskStore(path).close()
        until = time.monotonic() + rounds
        work = [partial(read, path, until, f"{seed}/{n}") for n in range(READERS)]
        children = [Child(one) for one in (partial(write, path, until, f"{seed}"), *work)]
        for child in children:
            stack.enter_context(child)
        told = [child.read() for child in children]
        if any([child.wait() for child in children]) or not all(told):
            outcome.violations.append("a process failed")
            return outcome
        done, expected = json.loads(told[0][0])
        seen = Counter[str]()
        for lines in told[1:]:
            seen.update(json.loads(lines[0]))
        for what, n in seen.items():
            if what.startswith("WRONG"):
                outcome.violations += n * [what.removeprefix("WRONG: ")]
        may_be: dict[int, set[int | None]] = {int(n): {v} for n, v in expected.items()}
        outcome.violations += [f"afterwards: {what}" for what in unsound(path, may_be)]
    outcome.figures += [
        f"writes: {counts(done)}; {sum(done.values()) / rounds:.0f} a second",
        f"gets: {counts(seen)}; {sum(seen.values()) / rounds:.0f} a second",
    ]
    return outcome
