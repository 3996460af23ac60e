"""The directory of a store: making it, being its one writer, saying what went wrong with it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import lmdb

from ragcache.errors import StoreError

_OWN_FILES = {"lock.mdb", "writer.lock", "lost+found", "mailbox"}

#: What to do about errors that say too little by themselves.
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


def claim(path: Path) -> IO[bytes]:
    """Make the directory, and become its one writer."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: a store is a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    names = set(os.listdir(path)) - _OWN_FILES
    if not names & {"data.mdb", "CURRENT"}:
        if names:
            raise StoreError(f"{path} is not empty and holds no store: give an empty directory")
        path.chmod(0o700)
    file = open(os.open(path / "writer.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(32).decode(errors="replace").strip()
        file.close()
        who = "this process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
        raise StoreError(
            f"the store in {path} is open for writing in {who}, and one process writes at a time: "
            "ask that one (`ragcache serve` answers over HTTP), or end it. `ragcache documents`, "
            "`stats` and `verify` only read, and may run beside it"
        ) from None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    return file


def release(file: IO[bytes]) -> None:
    """Stop being the writer: closes what ``claim`` returned."""
    # Unlocked by name: a forked child may hold the same open file and outlive us.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def sync_folder(folder: Path) -> None:
    """Make what was renamed or made in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turn what LMDB and the file system raise into a StoreError with the fix."""
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
