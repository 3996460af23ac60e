"""A model of a disk after a power loss, with the weakest guarantees that POSIX allows.

A file's data is durable once the file is synced, and a name in a folder once the folder is. A write
with O_DSYNC is durable by itself. Of later operations, every sector of 512 bytes and every change
of a name may be present or not, in any order; the size is any that the file has had since, and
unwritten parts read as zeros. ext4, XFS and btrfs guarantee more.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Union

from bench.powerloss.recording import Op, RecordingError

SECTOR = 512
DEAF = ("data", "files", "folders")  # syncs that a disk can be told to ignore, see Disk
_HOW = ("none", "all", "start", "one", "but one", "any")
Tree = dict[str, bytes | None]  # path -> data, None for a folder
Node = Union["File", "Folder"]


@dataclass
class File:
    """``pending`` are writes and changes of size."""

    name: str
    sure: bytearray = field(default_factory=bytearray)
    pending: list[Op] = field(default_factory=list)

    def now(self) -> bytearray:
        data = self.sure.copy()
        for op in self.pending:
            _resize(data, op.at if op.kind == "t" else max(len(data), op.at + len(op.data)))
            data[op.at : op.at + len(op.data)] = op.data
        return data

    def sync(self) -> None:
        self.sure, self.pending = self.now(), []

    def crashed(self, rng: random.Random) -> bytes:
        sizes, least = [len(self.sure)], 0
        for number, op in enumerate(self.pending, start=1):
            sizes.append(op.at if op.kind == "t" else max(sizes[-1], op.at + len(op.data)))
            least = number if op.durable else least
        last = len(self.pending)
        total = sum(1 for op in self.pending for _ in _sectors(op))
        how = rng.choice(_HOW)
        until = {"none": least, "all": last}.get(how, rng.randint(least, last))
        data, kept = self.sure.copy(), _kept(how, total, rng)
        for number, op in enumerate(self.pending):
            if op.kind == "t" and number < until:
                del data[op.at :]
            for start, end in _sectors(op):
                if next(kept) or op.durable:
                    _resize(data, max(len(data), op.at + end))
                    data[op.at + start : op.at + end] = op.data[start:end]
        _resize(data, sizes[until])
        return bytes(data)


@dataclass
class Folder:
    """``pending`` are changes of names, None for one that is gone; each happens or does not."""

    sure: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)
    now: dict[str, Node] = field(default_factory=dict)

    def change(self, names: dict[str, Node | None]) -> None:
        self.pending.append(names)
        _rename(self.now, names)

    def sync(self) -> None:
        self.sure, self.pending = self.now.copy(), []

    def crashed(self, rng: random.Random) -> dict[str, Node]:
        names = self.sure.copy()
        how = rng.choice(_HOW)
        kept = _kept(how, len(self.pending), rng)
        for change in self.pending:
            if next(kept):
                _rename(names, change)
        return names


class Disk:
    """An empty disk, whose root folder is durable.

    It ignores the syncs in ``deaf``: of LMDB's ``data``, of ``files`` of chunks, of ``folders``.
    Raises RecordingError if the operations are incomplete.
    """

    def __init__(self, deaf: Collection[str] = ()) -> None:
        self._root = Folder()
        self._nodes: dict[int, Node] = {}
        self._deaf = deaf

    def apply(self, op: Op) -> None:
        try:
            if op.kind in "wts":
                self._to_node(op)
            else:
                self._to_names(op)
        except KeyError as error:
            raise RecordingError(f"{op.kind} of {error}, which nothing has made") from None

    def start(self, op: Op) -> None:
        """Begin an operation during which the power fails: none of it is durable."""
        if op.kind != "s":
            self.apply(replace(op, durable=False))

    def now(self) -> Tree:
        """The files as programs see them."""
        return dict(_walk("", self._root, None))

    def crashed(self, rng: random.Random) -> Tree:
        """The files as they may be after the power loss."""
        return dict(_walk("", self._root, rng))

    def _to_node(self, op: Op) -> None:
        node = self._nodes[op.node]
        if op.kind != "s":
            assert isinstance(node, File)
            node.pending.append(op)
            return
        what = "folders" if isinstance(node, Folder) else _kind(node)
        if what not in self._deaf:
            node.sync()

    def _to_names(self, op: Op) -> None:
        if op.kind == "d" and not op.data:
            self._nodes[op.node] = self._root
            return
        folder, name = self._locate(op.data.decode())
        if op.kind == "u":
            folder.change({name: None})
        elif op.kind == "r":
            target, new = self._locate(op.target)
            if target is not folder:
                raise RecordingError("a rename into another folder: say what may be left of it")
            folder.change({name: None, new: folder.now[name]})
        elif op.kind in "cd":
            self._nodes[op.node] = node = File(name) if op.kind == "c" else Folder()
            folder.change({name: node})
        else:
            raise RecordingError(f"an operation {op.kind!r}")

    def _locate(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split("/")
        at = self._root
        for part in folders:
            below = at.now[part]
            assert isinstance(below, Folder)
            at = below
        return at, name


def _kind(file: File) -> str:
    return "data" if file.name == "data.mdb" else "files"


def _walk(
    path: str, folder: Folder, rng: random.Random | None
) -> Iterator[tuple[str, bytes | None]]:
    names = folder.now if rng is None else folder.crashed(rng)
    for name, node in sorted(names.items()):
        if isinstance(node, Folder):
            yield path + name, None
            yield from _walk(f"{path}{name}/", node, rng)
        elif rng is None:
            yield path + name, bytes(node.now())
        elif name == "lock.mdb":  # a map that LMDB writes to: anything may be in it
            size = len(node.now())
            yield path + name, rng.choice((b"", bytes(size), rng.randbytes(size)))
        else:
            yield path + name, node.crashed(rng)


def _kept(how: str, total: int, rng: random.Random) -> Iterator[bool]:
    """Which of so many things that were not synced are left."""
    at, share = rng.randint(0, total), rng.random()
    for number in range(total):
        yield {
            "none": False,
            "all": True,
            "start": number < at,
            "one": number == at,
            "but one": number != at,
            "any": rng.random() < share,
        }[how]


def _sectors(op: Op) -> Iterator[tuple[int, int]]:
    """The parts of a write that are there or not: where they are in its data."""
    start = 0
    while start < len(op.data):
        end = min(len(op.data), start + SECTOR - (op.at + start) % SECTOR)
        yield start, end
        start = end


def _resize(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


def _rename(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node
