"""The file ``CURRENT``, which names the folder of a store's current LMDB environment."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import lmdb
from xxhash import xxh3_64_intdigest

from ragcache.errors import StoreError
from ragcache.store.lmdb.directory import sync_folder

CURRENT_FILE, _PART = "CURRENT", "CURRENT.part"


def copy_compacted(env: lmdb.Environment, folder: Path) -> None:
    """Copy the live data of ``env`` to a new folder, durably."""
    folder.mkdir(mode=0o700)
    with open(os.open(folder / "data.mdb", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        env.copyfd(file.fileno(), compact=True)
        os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)  # the folder is durable before it is named


def set_current(path: Path, folder: Path) -> None:
    """Make ``folder`` the current one of the store in ``path``, atomically and durably."""
    part = path / _PART
    part.unlink(missing_ok=True)  # of a compaction that was killed
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(_pointer(folder.name))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / CURRENT_FILE)
    sync_folder(path)


def _pointer(name: str) -> bytes:
    return b"%s %016x\n" % (name.encode(), xxh3_64_intdigest(name.encode()))


def current_folder(path: Path) -> Path:
    """The folder of the current LMDB environment of the store in ``path``. Raises StoreError where
    ``CURRENT`` is damaged."""
    try:
        pointer = (path / CURRENT_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return path
    match = re.match(rb"(data-\d+) ", pointer)
    name = match[1].decode() if match else ""
    if pointer != _pointer(name):
        there = [folder.name for folder in _environments(path)]
        fix = _pointer(there[-1]).decode().strip() if there else "the backup's"
        raise StoreError(
            f"{path / CURRENT_FILE} is damaged. It names the folder that holds the store, of which "
            f"there are: {', '.join(there) or 'none'}. Write one line into it: {fix}"
        )
    return path / name


def _environments(path: Path) -> list[Path]:
    """The folders of a store with names that compaction gives, the newest last."""
    there = [each for each in path.glob("data-*") if re.fullmatch(r"data-\d+", each.name)]
    return sorted(there, key=compaction_number)


def compaction_number(folder: Path) -> int:
    """The number of compactions of the store up to the one that made ``folder``."""
    return int(folder.name.removeprefix("data-")) if folder.name.startswith("data-") else 0


def remove_old_folders(path: Path) -> None:
    """Remove all environments but the current one."""
    named = current_folder(path)
    for folder in _environments(path):
        if folder != named:
            shutil.rmtree(folder, ignore_errors=True)
    for name in (_PART, *(("data.mdb", "lock.mdb") if named != path else ())):
        with suppress(FileNotFoundError):
            (path / name).unlink()
