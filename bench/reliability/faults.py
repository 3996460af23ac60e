"""Inject eight kinds of faults into each of five operations of a store, in both layouts.

The operation must succeed, or raise a StoreError with advice and leave nothing half-written. Reads
must continue, and so must writes once the fault is over. The next process to open the store must
find exactly what was acknowledged. :mod:`bench.reliability.injure` makes the faults, some of them
in several ways. A fault that cannot be made on this machine (no seccomp, no right to mount) is left
out and reported.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.reliability.child import Child, Send
from bench.reliability.injure import CHUNKS, FAULTS, LAYOUTS, Fault, Scene
from bench.reliability.outcome import Outcome, scratch
from bench.reliability.refuse import possible
from bench.reliability.samples import (
    Wrong,
    chunk_key,
    put,
    served,
    strays,
    unsound,
    version_of,
)
from ragcache.errors import StoreError
from ragcache.store import DiskStore, Miss
from ragcache.store.disk.store import Layout

FULL, SHORT = 2, 1  # layouts for every fault and operation
_LONGEST = 30  # seconds that a case may take


def get(store: DiskStore, layout: Layout) -> None:
    """Right, or a miss that is counted as unreadable."""
    for number in range(CHUNKS):
        found = store.get(chunk_key(number))
        assert found.reason == "unreadable" if isinstance(found, Miss) else version_of(found) == 1


#: What is done, and the version that chunk 0 has afterwards.
OPERATIONS: dict[str, tuple[Callable[[DiskStore, Layout], object], int | None]] = {
    "put": (lambda store, layout: put(store, 0, 2), 2),
    "get": (get, 1),
    "delete": (lambda store, layout: store.delete(chunk_key(0)), None),
    "convert": (lambda store, layout: store.convert(layout), 1),
    "compact": (lambda store, layout: store.compact(), 1),
}


def case(
    path: Path, layout: Layout, fault: Fault, name: str, help: Callable[[], None], send: Send
) -> None:
    """In a process of its own: open, make the fault, operate, and report."""
    signal.alarm(_LONGEST)
    store = DiskStore(path, layout=layout, **fault.options)
    scene, told = Scene(store, send.into, help), dict[str, str]()
    with contextmanager(fault.make)(scene):
        told["did"] = attempt(lambda: OPERATIONS[name][0](store, layout))
        told["read"] = attempt(lambda: served(store, 6))
    if fault.passes:
        told["on"] = attempt(lambda: put(store, 7, 1))
    if fault.tidies and not store.tables.readonly:
        told["tidy"] = attempt(lambda: tidy(store))
    send(json.dumps([told, scene.filled]))


def attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except StoreError as error:
        return f"StoreError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def tidy(store: DiskStore) -> None:
    """Raises Wrong where a failed operation has left something on the disk."""
    if left := strays(store):
        raise Wrong(f"left over until the next open: {', '.join(left)}")


def stand_by(go: int, path: Path, fault: Fault, send: Send) -> None:
    """The helper: wait to be asked, and stay as it is then."""
    os.read(go, 1)
    with fault.helper(path):
        send("ready")
        signal.pause()


def tried(folder: Path, layout: Layout, fault: Fault, name: str) -> tuple[str, list[str]]:
    """How the operation ended, and what is wrong with that."""
    with fault.place(folder) as path, ExitStack() as stack:
        asked, go = os.pipe()
        helper = stack.enter_context(Child(partial(stand_by, asked, path, fault)))

        def help() -> None:
            os.write(go, b".")
            helper.line()

        work = partial(case, path, layout, fault, name, help)
        child = stack.enter_context(Child(work))
        lines, status = child.read(), child.wait()
        stack.close()
        os.close(asked)
        os.close(go)
        before, after = 1, OPERATIONS[name][1]
        expected: dict[int, set[int | None]] = {number: {1} for number in range(CHUNKS)}
        if not lines:
            what, wrong = "ended", [f"the process ended with {status}"]
            expected[0] = {before, after}
        else:
            told, filled = json.loads(lines[0])
            what, wrong = judged(told, fault, str(path))
            expected[0] = {after} if what == "done" else {before, after}
            expected |= {number: {1} for number in filled}
        wrong += [f"afterwards: {line}" for line in unsound(folder / "store", expected)]
    return what, wrong


def judged(told: dict[str, str], fault: Fault, path: str) -> tuple[str, list[str]]:
    wrong = []
    what = told["did"].partition(":")[0]
    for name, end in told.items():
        kind = end.partition(":")[0]
        end = re.sub(r"STORE/\S+", "STORE/...", end.replace(path, "STORE"))
        if kind not in ("done", "StoreError", "Wrong"):
            wrong.append(f"an exception that is no StoreError: {end}")
        elif kind == "Wrong":
            wrong.append(end)
        elif kind == "StoreError" and name == "on":
            wrong.append(f"does not go on once it is over: {end}")
        elif kind == "StoreError" and not re.search(fault.advice, end):
            wrong.append(f"does not say what to do: {end}")
    return what, wrong


def run(rounds: int, seed: int) -> Outcome:
    rounds = min(rounds, len(LAYOUTS))
    outcome = Outcome(f"{len(FAULTS)} faults x {len(OPERATIONS)} operations x {rounds} layouts")
    for fault_name, fault in FAULTS.items():
        if fault.seccomp and not possible():
            outcome.figures.append(f"{fault_name}: left out, there is no seccomp here")
            continue
        ends: dict[str, list[str]] = {name: [] for name in OPERATIONS if name != fault.skips}
        for name in ends:
            for layout in LAYOUTS[:rounds]:
                with scratch() as folder:
                    try:
                        what, wrong = tried(folder, layout, fault, name)
                    except subprocess.CalledProcessError:
                        what, wrong = "left out, mounting is not allowed", []
                ends[name].append(what)
                outcome.violations += [f"{fault_name}: {line}" for line in wrong]
        ways = (f"{name} {'/'.join(dict.fromkeys(e))}" for name, e in ends.items())
        outcome.figures.append(f"{fault_name}: {', '.join(ways)}")
    return outcome
