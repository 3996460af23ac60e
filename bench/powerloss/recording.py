"""Record a store's disk operations, in a child process in which record.c is preloaded.

The child logs the beginning and end of each step. Before every compaction and at its end it copies
the store, and the state that follows from the log is compared with the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.powerloss.workload import Step, Subject

_RECORD = struct.Struct("<cBHIIIQQ")
_ROOT = Path(__file__).resolve().parents[2]


class RecordingError(Exception):
    """The recording is incomplete, so results from it would be meaningless."""


@dataclass(frozen=True, slots=True)
class Op:
    """What was done to the disk, or (``b``, ``e``, ``k``) noted: a step begins, ends; a copy.

    ``c`` makes a file, ``d`` a folder (with no path: the root, which is there), ``u`` removes
    either, ``r`` renames; ``w`` writes, ``t`` sets the size, ``s`` syncs a file or folder.
    """

    kind: str
    node: int  # inode number; the step's or copy's number
    at: int  # offset or size
    durable: bool  # a write that is synced by itself
    data: bytes  # for names: the path
    target: str  # of a rename


def compiler() -> str | None:
    """Of C, if there is one and what it compiles can be preloaded."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None) if sys.platform == "linux" else None


def record(folder: Path, steps: Sequence[Step]) -> None:
    """Do these to ``folder/disk/store``; the log is ``folder/log``, the steps ``folder/steps``."""
    compile_with = compiler()
    if compile_with is None:
        raise RecordingError("no C compiler on Linux: install gcc, or name one in CC")
    shim, source = folder / "record.so", Path(__file__).with_name("record.c")
    options = ["-std=c11", "-O2", "-fPIC", "-shared", "-pthread"]
    subprocess.run([compile_with, *options, "-o", str(shim), str(source)], check=True)
    (folder / "disk").mkdir()
    paths = {"POWERLOSS_ROOT": str(folder / "disk"), "POWERLOSS_LOG": str(folder / "log")}
    (folder / "steps").write_text(json.dumps([asdict(step) for step in steps]))
    command = [sys.executable, "-m", "bench.powerloss.recording", str(folder)]
    preloaded = os.environ | paths | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=_ROOT, env=preloaded)


def read_steps(folder: Path) -> list[Step]:
    steps = json.loads((folder / "steps").read_text())
    return [Step(**step | {"uses": tuple(step["uses"])}) for step in steps]


def read_ops(folder: Path) -> list[Op]:
    raw, at, ops = (folder / "log").read_bytes(), 0, []
    while at < len(raw):
        kind, durable, _, first, second, _, node, offset = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        data, target = raw[at : at + first], raw[at + first : at + first + second]
        ops.append(Op(kind.decode(), node, offset, bool(durable), data, target.decode()))
        at += first + second
    return ops


def files(folder: Path) -> Iterator[tuple[str, bytes | None]]:
    """Everything below a folder: path -> data, None for a folder."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None


def _child(folder: Path, steps: list[Step]) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
    subject, copies = Subject(folder / "disk" / "store"), 0

    def note(kind: bytes, number: int) -> None:
        os.write(log, _RECORD.pack(kind, 0, 0, 0, 0, 0, number, 0))

    def copy() -> None:
        nonlocal copies
        shutil.copytree(folder / "disk", folder / f"copy-{copies}")
        note(b"k", copies)
        copies += 1

    for number, step in enumerate(steps):
        if step.kind == "compact":
            copy()
        note(b"b", number)
        subject.do(step)
        note(b"e", number)
    subject.close()
    copy()


if __name__ == "__main__":
    _child(Path(sys.argv[1]), read_steps(Path(sys.argv[1])))
