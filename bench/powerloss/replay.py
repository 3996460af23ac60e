"""Simulate one power loss: where the log is cut, what is left, and whether the store recovers."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.powerloss.check import Check, Outcome
from bench.powerloss.disk import Disk, Tree
from bench.powerloss.recording import RecordingError, files, read_ops, read_steps
from bench.powerloss.workload import State, states


@dataclass(frozen=True, slots=True)
class Rules:
    """What is lost. The same rules and number, the same power loss."""

    seed: int = 0
    deaf: tuple[str, ...] = ()  # syncs that the disk ignores, see Disk
    during: tuple[str, ...] = ()  # the kinds of steps that power is lost in; none: all


class Recording:
    """What ``record`` has left in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = read_steps(folder)
        self.ops = read_ops(folder)

    def count(self, kinds: str) -> int:
        """Operations of any of these kinds."""
        return sum(1 for op in self.ops if op.kind in kinds)

    @cached_property
    def states(self) -> list[State]:
        """What the store holds before each step, and after the last."""
        return states(self.steps)

    @cached_property
    def bounds(self) -> list[list[int]]:
        """Where in the log each step begins and ends."""
        found: list[list[int]] = [[] for _ in self.steps]
        for at, op in enumerate(self.ops):
            if op.kind in "be":
                found[op.node].append(at)
        return found

    def check_complete(self) -> None:
        """RecordingError where the log does not explain, to the byte, what the real disk held."""
        disk = Disk()
        for op in self.ops:
            if op.kind == "k":
                real = dict(files(self.folder / f"copy-{op.node}"))
                _compare(f"copy {op.node}", disk.now(), real)
            elif op.kind not in "be":
                disk.apply(op)
        _compare("the end", disk.now(), dict(files(self.folder / "disk")))
        if any(len(both) != 2 for both in self.bounds):
            raise RecordingError("not every step was done to its end")

    def cut(self, rng: random.Random, during: tuple[str, ...] = ()) -> int:
        """How many operations were done: every kind of step is as likely, and of operation in it.

        Most operations are writes, and what is rare is where stores break.
        """
        kind = rng.choice(sorted({step.kind for step in self.steps} & set(during or _ALL)))
        number = rng.choice([n for n, step in enumerate(self.steps) if step.kind == kind])
        begin, end = self.bounds[number]
        last = rng.choice(sorted({op.kind for op in self.ops[begin : end + 1]}))
        return rng.choice([n + 1 for n in range(begin, end + 1) if self.ops[n].kind == last])

    def disk(self, cut: int, rules: Rules) -> Disk:
        """The disk when so many operations were done, and the next one was on its way."""
        disk = Disk(rules.deaf)
        for op in self.ops[:cut]:
            if op.kind not in "bek":
                disk.apply(op)
        for op in self.ops[cut : cut + 1]:
            if op.kind not in "bek":
                disk.start(op)
        return disk


_ALL = ("open", "put", "delete", "document", "forget", "convert", "compact", "scratch")


def replay(
    recording: Recording, number: int, rules: Rules, room: Path, cut: int | None = None
) -> Outcome:
    """Lose power the ``number``-th way, after ``cut`` operations or anywhere.

    ``room``: the folder to do it in, which is emptied.
    """
    rng = random.Random(f"{rules.seed}-{number}")
    cut = recording.cut(rng, rules.during) if cut is None else cut
    tree = recording.disk(cut, rules).crashed(rng)
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    for path, data in tree.items():
        if data is None:
            (room / path).mkdir(mode=0o700)
        else:
            (room / path).write_bytes(data)
    begun = sum(1 for begin, _ in recording.bounds if begin < cut)
    ended = sum(1 for _, end in recording.bounds if end < cut)
    doing = recording.steps[ended].kind if begun > ended else "nothing"
    outcome = Outcome(number, f"after operation {cut}, step {ended}, doing {doing}")
    Check(outcome, recording.steps[:begun], recording.states[ended : begun + 1]).run(room / "store")
    return outcome


def _compare(when: str, ours: Tree, real: Tree) -> None:
    """A RecordingError where these differ, but for what is in LMDB's locks: those are a map."""
    paths = ours.keys() | real.keys()
    missing = [path for path in paths if path not in ours or path not in real]
    other = [p for p in paths if ours.get(p) != real.get(p) and not p.endswith("lock.mdb")]
    if differ := sorted({*missing, *other}):
        raise RecordingError(
            f"at {when}, {len(differ)} files are not what the log says, {differ[:3]} among them: "
            "the store uses a call that record.c does not know"
        )
