"""Objects in a directory: a remote with the URL ``file:///directory``.

Only regular files are objects. Anything else (a pipe, a device, a circular link) is never read, for
a read might block forever.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

from ragcache.store.lmdb.directory import sync_folder


class NotAFileError(Exception):
    """The name is not that of a regular file."""


class FileRange(NamedTuple):
    """Bytes of a file, with its size and tag when they were read."""

    data: bytes
    size: int  # of the whole file
    tag: str  # changes with every write


class FolderStore:
    """Objects below ``root``, which is made where it is missing (0700, files 0600)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def read(self, name: str, start: int, end: int) -> FileRange:
        """Bytes ``start`` to ``end``, exclusive; fewer at the file's end. Raises FileNotFoundError,
        NotAnObject, and OSError for a file that cannot be read."""
        try:
            handle = os.open(self.root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link in circles, a socket
                raise NotAFileError(f"{self.root / name} is no regular file") from error
            raise
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise NotAFileError(f"{self.root / name} is no regular file")
            parts, at, end = [], start, min(end, found.st_size)
            while at < end and (part := os.pread(handle, end - at, at)):
                parts.append(part)
                at += len(part)
        finally:
            os.close(handle)
        tag = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
        return FileRange(parts[0] if len(parts) == 1 else b"".join(parts), found.st_size, tag)

    def write(self, name: str, data: bytes | bytearray, *, replacing: bool) -> bool:
        """Write a file whole, durable on return. False where it exists, unless ``replacing``."""
        path = self.root / name
        folders = [path.parent, *path.parent.parents]
        for folder in reversed(folders[: folders.index(self.root)]):
            folder.mkdir(mode=0o700, exist_ok=True)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with open(os.open(part, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replacing:
                part.replace(path)
            else:
                os.link(part, path)
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        for folder in folders[: folders.index(self.root) + 1]:
            sync_folder(folder)
        return True

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        (self.root / name).unlink(missing_ok=True)

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Names and sizes of the regular files below the directory ``prefix``, in no particular
        order."""
        found = []
        for folder, _, files in os.walk(self.root / prefix, onerror=_raise):
            for file in files:
                path = Path(folder) / file
                try:
                    seen = path.lstat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if stat.S_ISREG(seen.st_mode):
                    found.append((path.relative_to(self.root).as_posix(), seen.st_size))
        return found


def _raise(error: OSError) -> None:
    """Raise what os.walk ignores, except for a directory that does not exist."""
    if not isinstance(error, FileNotFoundError):
        raise error
