"""Chunks in files of their own: for layers so large that LMDB reads them slower than a plain file.

``kv/ab/ab12…-5f3a09c1``: a copy of the header, then the layers, each at a multiple of 4 KiB. A
file is written whole, synced and given its name before the header that names it is committed, and
removed after the commit that forgets it. A crash leaves at most a file that no header names.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ragcache.store.base import Miss
from ragcache.store.codecs.base import Bytes
from ragcache.store.directory import sync_folder
from ragcache.store.header import Payload

PAGE = 4096
_PART = ".part"
_sync = getattr(os, "fdatasync", os.fsync)


class ChunkFiles:
    """Files of chunks below ``root``, which is made with the first of them (0700, files 0600)."""

    def __init__(self, root: Path) -> None:
        self.root, self._folder = root, str(root)

    def new_name(self, digest: bytes) -> str:
        """A name that was never given: a chunk that is put again gets another file."""
        return f"{digest.hex()}-{secrets.token_hex(4)}"

    @contextmanager
    def create(self, name: str) -> Iterator[ChunkFile]:
        """Write a file; it is there, durably, once the ``with`` has ended, or not at all."""
        path = self._path(name)
        self.root.mkdir(mode=0o700, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part = path.with_name(name + _PART)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "wb", buffering=0) as file:
                yield ChunkFile(file)
                _sync(file.fileno())
            part.rename(path)
            for folder in (path.parent, self.root, self.root.parent):
                sync_folder(folder)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise

    def read(self, name: str, payload: Payload, room: Bytes) -> Bytes | Miss:
        """The bytes of one layer, not checked yet: the beginning of ``room``, which holds them.

        What is wrong with the file is a Miss; OSError where the process or the machine is at its
        limits (open files, memory).
        """
        try:
            handle = os.open(f"{self._folder}/{name[:2]}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Miss("truncated", f"its file {name[:12]}… is gone")
        try:
            offset, length, _ = payload
            if hasattr(os, "posix_fadvise"):  # the next layer is on its way while this one is read
                os.posix_fadvise(handle, offset, 2 * length, os.POSIX_FADV_WILLNEED)
            raw, at = room[:length], 0
            while at < length and (more := os.preadv(handle, [raw.data[at:]], offset + at)):
                at += more
            if at < length:
                return Miss("truncated", f"its file ends {length - at} bytes early")
            return raw
        except OSError as error:
            return Miss("unreadable", f"its file cannot be read: {error}")
        finally:
            os.close(handle)

    def remove(self, name: str) -> None:
        """Remove a file that no header names; what cannot be removed is left for the next sweep."""
        with suppress(OSError):
            self._path(name).unlink()

    def names(self) -> Iterator[str]:
        """All files, those that were never finished too."""
        if self.root.is_dir():
            for folder in sorted(filter(Path.is_dir, self.root.iterdir())):
                yield from sorted(os.listdir(folder))

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / name


def file_digest(name: str) -> bytes:
    """The digest of the chunk that a file is of; of a file of somebody else, of none."""
    try:
        return bytes.fromhex(name[:64])
    except ValueError:
        return b""


class ChunkFile:
    """A file that is being written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0

    def skip(self, size: int) -> None:
        """Leave room for a header of ``size`` bytes."""
        self._at = aligned(size)

    def append(self, raw: Bytes) -> int:
        """Write a layer; its offset."""
        offset = self._at
        self._write(raw.data, offset)
        self._at = aligned(offset + len(raw))
        return offset

    def finish(self, header: bytes) -> None:
        """Write the header in front of the layers."""
        self._write(memoryview(header), 0)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)


def aligned(size: int) -> int:
    """Where the next layer can begin, behind ``size`` bytes."""
    return -(-size // PAGE) * PAGE
