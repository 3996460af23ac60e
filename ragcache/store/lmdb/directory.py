"""The directory of a store: creating it, the writer's lock, and errors with their fixes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import lmdb

from ragcache.errors import LockedError, StoreError

__all__ = ["check_writer_lock"]

_LOCK_FILE = "writer.lock"
NEW_DATA_FILE = "data.new"  # name of a new store's data file until it is complete
_OWN_FILES = {
    "lock.mdb",
    _LOCK_FILE,
    NEW_DATA_FILE,
    f"{NEW_DATA_FILE}-lock",
    "lost+found",
    "mailbox",
}

LOCK_TIMEOUT_S = 0.5  # long enough for a process that only stores the misses of one request

#: Fixes for errors whose messages have none.
_OTHERWISE = "Look at the disk and at who may use it: `ragcache doctor` helps."
_FIXES = {
    errno.ENOSPC: "The disk is full: free some space; what was committed before is intact.",
    errno.EIO: "The disk is full or failing: check both; what was committed before is intact.",
    errno.EROFS: "The file system is read-only: open the store with readonly=True.",
    errno.EACCES: "Run as the user who owns it, or give that user access.",
    errno.EMFILE: "Too many files are open in this process: raise `ulimit -n`, or close some.",
    errno.ENFILE: "Too many files are open on this machine: close some.",
    errno.EDQUOT: "The disk quota is used up: free some space; what was committed is intact.",
    errno.EFBIG: "The file may not grow further: raise `ulimit -f`, or use another file system.",
    errno.ENOMEM: "No address space for the map: raise `ulimit -v` or pass a smaller map_size.",
}


def acquire_writer_lock(path: Path, patience_s: float = 0.0) -> IO[bytes]:
    """Make the directory, and lock it for this process as its writer. Raises LockedError where
    another process holds the lock for longer than ``patience_s``."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: a store is a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    names = {name for name in os.listdir(path) if not name.startswith(".")} - _OWN_FILES
    if not names & {"data.mdb", "CURRENT"}:
        if names:
            raise StoreError(f"{path} is not empty and holds no store: give an empty directory")
        path.chmod(0o700)
    file = _locked(path, os.O_CREAT, patience_s)
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    return file


def check_writer_lock(path: Path) -> None:
    """Raise LockedError where another process is the writer of the store in ``path``, before work
    that would be lost. Other problems are left to the opening of the store."""
    try:
        file = _locked(path, 0, LOCK_TIMEOUT_S)
    except LockedError:
        raise
    except (OSError, StoreError):
        return
    release_writer_lock(file)


def _locked(path: Path, flags: int, patience_s: float) -> IO[bytes]:
    """Open and lock the file of the writer's lock."""
    refuse_links(path, _LOCK_FILE)
    handle = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    file, until = open(handle, "r+b", buffering=0), time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise LockedError(_held(path, file)) from None
            time.sleep(0.02)
    except BaseException:
        file.close()
        raise


def _held(path: Path, file: IO[bytes]) -> str:
    """The message that says which process holds the writer's lock, and since when."""
    holder = file.read(32).decode(errors="replace").strip()
    who = "this process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
    since = time.strftime("%F %T", time.localtime(os.fstat(file.fileno()).st_mtime))
    return (
        f"the store in {path} is open for writing in {who} since {since}, and one process writes "
        "at a time: ask that one (`ragcache serve` answers over HTTP), or end it. What only reads "
        "may run beside it: `ragcache query`, `documents`, `stats`, `verify`, `doctor`"
    )


def refuse_links(folder: Path, *names: str) -> None:
    """Raise StoreError where one of a store's own files is a link, a pipe or a device, through
    which opening it would change something else."""
    for name in names:
        try:
            mode = (folder / name).lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not stat.S_ISREG(mode):
            raise StoreError(
                f"{folder / name} is no regular file, and a store's own files are never links or "
                "devices: find out who has put it there, and remove it"
            )


def release_writer_lock(file: IO[bytes]) -> None:
    """Release the lock that :func:`acquire_writer_lock` returned."""
    # Unlocked by name: a forked child may hold the same open file and outlive us.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def translate_errors(path: Path, action: str) -> Iterator[None]:
    """Turn exceptions of LMDB and the file system into a StoreError that says the fix."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.TxnFullError) as error:
        raise StoreError(
            f"cannot {action} the store in {path}: it has reached its map_size ({error}). "
            "Compact it and delete chunks, or open it with a larger map_size"
        ) from error
    except lmdb.MapResizedError as error:
        raise StoreError(
            f"cannot {action} the store in {path}: another process has opened it with a larger "
            "map_size and outgrown this one. Close it, and open it with that map_size"
        ) from error
    except lmdb.PanicError as error:
        raise StoreError(
            f"cannot {action} the store in {path}: writing failed in the middle of a commit "
            f"({error}). What was committed before is intact: close the store and open it again"
        ) from error
    except (lmdb.InvalidError, lmdb.VersionMismatchError) as error:
        raise StoreError(
            f"{path / 'data.mdb'} is not a store or is damaged ({error}): restore it, or delete "
            "the directory and index again"
        ) from error
    except (lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
        raise StoreError(
            f"{path / 'data.mdb'} is damaged ({error}): restore it, or delete the directory and "
            "index again"
        ) from error
    except lmdb.ReadersFullError as error:
        raise StoreError(
            f"cannot {action} the store in {path}: 1024 transactions read it at once, of all "
            "processes together. Close some of them"
        ) from error
    except (lmdb.Error, OSError) as error:
        if "already open in this process" in str(error):
            raise StoreError(
                f"the store in {path} is already open in this process, or in the one that it was "
                "forked from: share that one, or start workers with the spawn method"
            ) from error
        code = error.code if isinstance(error, lmdb.Error) else error.errno
        raise StoreError(
            f"cannot {action} the store in {path}: {error}. {_FIXES.get(code or 0, _OTHERWISE)}"
        ) from error
