"""How the faults are made: each function says what it does, and to whom.

A fault is made around an operation, in a process of its own; where another process is needed, it
stands by from before the store was opened.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from bench.reliability.refuse import Call, refuse
from bench.reliability.samples import put
from ragcache.errors import StoreError
from ragcache.store import DiskStore
from ragcache.store.disk import store as disk
from ragcache.store.disk.store import Layout
from ragcache.store.lmdb.tables import TABLES

CHUNKS = 8
LAYOUTS: tuple[Layout, ...] = ("records", "files")
_LARGEST_FIRST = (3, 5, 1, 2, 4, 0)  # number modulo 6, see samples


@dataclass
class Scene:
    """An open store in which a fault is about to happen, in a process of its own."""

    store: DiskStore
    report: int  # the file that the report is written to
    help: Callable[[], None]  # lets the helper process do its part, and waits until it has
    filled: list[int] = field(default_factory=list)  # chunks that the fault itself has put


Place = Callable[[Path], AbstractContextManager[Path]]


@contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """A store in ``folder``; the path at which it is to be opened."""
    fill(folder / "store")
    yield folder / "store"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """The same in a tmpfs of 3 MB. Raises CalledProcessError where mounting is not allowed."""
    with mounted("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)), plain(folder) as path:
        yield path


@contextmanager
def readonly_view(folder: Path) -> Iterator[Path]:
    """A bind mount of the store, read-only. Raises as :func:`small_disk`."""
    view = folder / "view"
    view.mkdir()
    with plain(folder) as path, mounted("--bind", str(path), str(view)):
        subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True, capture_output=True)
        yield view


@contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


def fill(path: Path) -> None:
    with DiskStore(path) as store:
        for number in range(CHUNKS):
            store.layout = LAYOUTS[number % 2]
            put(store, number, 1)


def nothing(scene: Scene) -> Iterator[None]:
    """Where the place is fault enough."""
    yield


def refused(error: int, *calls: str, opening: int = 0) -> Callable[[Scene], Iterator[None]]:
    """Seccomp: the kernel answers these with ``error``; ``write`` too, but for our own report."""

    def make(scene: Scene) -> Iterator[None]:
        chosen = [Call(name) for name in calls] + [Call("write", "is not", 0, scene.report)]
        if opening:
            chosen += [Call("openat", "has bits", 2, opening), Call("open", "has bits", 1, opening)]
        refuse(chosen, error)
        yield

    return make


def last_write_fails(scene: Scene) -> Iterator[None]:
    """Seccomp: EIO for writes of less than a page, which is what a commit of LMDB ends with."""
    refuse([Call("pwrite64", "is below", 2, 4096)], errno.EIO)
    yield


def disk_full(scene: Scene) -> Iterator[None]:
    """A file fills what is left of the tmpfs, to the last page; afterwards it goes."""
    filler = scene.store.tables.path.parent / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


def no_more_files(scene: Scene) -> Iterator[None]:
    """RLIMIT_NOFILE at what is open: EMFILE for the next one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def compaction_fails(scene: Scene) -> Iterator[None]:
    """Every change finds the store wasteful, and seccomp has no space for the new folder.

    The change itself is committed by then, and must not fail.
    """
    disk._CHECK_EVERY = 1
    scene.store.is_wasteful = lambda: True  # type: ignore[method-assign]
    refuse([Call("mkdir"), Call("mkdirat")], errno.ENOSPC)
    yield


def map_full(scene: Scene) -> Iterator[None]:
    """A map of 512 KB, into which chunks are put until not even the smallest goes in."""
    for kind in _LARGEST_FIRST:
        with suppress(StoreError):
            for number in range(102 + kind, 3000, 6):
                put(scene.store, number, 1)
                scene.filled.append(number)
    yield


def helped(scene: Scene) -> Iterator[None]:
    """Another process does it, see the fault's helper."""
    scene.help()
    yield


@contextmanager
def outgrow(path: Path) -> Iterator[None]:
    """With a larger map, and no regard for writer.lock, it lets the file grow beyond our map."""
    with lmdb.open(str(path), map_size=1 << 30, max_dbs=2 * len(TABLES)) as env:
        layers = env.open_db(b"layers", create=False)
        for value in (bytes(8 << 20), None):
            with env.begin(write=True, db=layers) as txn:
                txn.delete(b"x") if value is None else txn.put(b"x", value)
    yield


@contextmanager
def take_all_readers(path: Path) -> Iterator[None]:
    """It begins read transactions until there is no room for one more."""
    with ExitStack() as stack:
        store = stack.enter_context(DiskStore(path, readonly=True))
        with suppress(StoreError):
            while True:
                stack.enter_context(store.tables.read())
        yield


@contextmanager
def die_with_all_readers(path: Path) -> Iterator[None]:
    """The same, and then it is killed."""
    with take_all_readers(path):
        os.kill(os.getpid(), signal.SIGKILL)
        yield


@contextmanager
def die_reading(path: Path) -> Iterator[None]:
    """It is killed within a read transaction."""
    with DiskStore(path, readonly=True).tables.read():
        os.kill(os.getpid(), signal.SIGKILL)
    yield


@contextmanager
def absent(path: Path) -> Iterator[None]:
    """It does nothing."""
    yield


@dataclass(frozen=True, slots=True)
class Fault:
    """``make`` happens around an operation; ``advice`` is what its error must say."""

    make: Callable[[Scene], Iterator[None]]
    advice: str
    passes: bool = False  # over after the operation: the store must go on then
    place: Place = plain
    helper: Callable[[Path], AbstractContextManager[None]] = absent
    options: dict[str, Any] = field(default_factory=dict)  # of the store
    tidies: bool = True  # files may be removed: nothing half-written may stay until the next open
    seccomp: bool = False  # needs that
    skips: str = ""  # an operation that it is no fault of


_NONE = "(?!)"  # an error that nobody should get
_WRITES = ("pwrite64", "pwritev", "pwritev2", "fallocate")
_MAKES = ("mkdir", "mkdirat", "rename", "renameat", "renameat2")
_CHANGES = (*_MAKES, "unlink", "unlinkat", "rmdir", "truncate", "ftruncate")
_SYNCS = ("fsync", "fdatasync")
_READS = ("pread64", "preadv", "preadv2")
FAULTS = {
    "ENOSPC, tmpfs": Fault(disk_full, "free some space", passes=True, place=small_disk),
    "ENOSPC": Fault(
        refused(errno.ENOSPC, *_WRITES, *_MAKES, opening=os.O_CREAT),
        "free some space",
        seccomp=True,
    ),
    "ENOSPC, compaction": Fault(compaction_fails, "cannot write to", skips="compact", seccomp=True),
    "EIO": Fault(
        refused(errno.EIO, *_WRITES, *_SYNCS, *_READS), "failing: check both", seccomp=True
    ),
    "EIO, last write": Fault(last_write_fails, "failing: check both|open it again", seccomp=True),
    "EMFILE, reader": Fault(
        no_more_files, "ulimit -n|[Cc]lose|readonly=True", options={"readonly": True}
    ),
    "EMFILE": Fault(no_more_files, "ulimit -n|[Cc]lose", passes=True),
    "map full": Fault(map_full, "larger map_size", options={"map_size": 1 << 19}),
    "map resized": Fault(helped, "again|map_size", helper=outgrow, options={"map_size": 1 << 21}),
    "readers full": Fault(helped, "[Cc]lose|[Ww]ait|fewer", helper=take_all_readers),
    "read-only": Fault(
        refused(errno.EROFS, *_WRITES, *_CHANGES, opening=os.O_WRONLY | os.O_RDWR | os.O_CREAT),
        "readonly=True",
        tidies=False,
        seccomp=True,
    ),
    "read-only, mount": Fault(
        nothing, "readonly=True", place=readonly_view, options={"readonly": True}
    ),
    "readers full, killed": Fault(helped, _NONE, passes=True, helper=die_with_all_readers),
    "killed reader": Fault(helped, _NONE, passes=True, helper=die_reading),
}
