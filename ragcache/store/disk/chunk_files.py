"""Chunks in files of their own, which are read faster than LMDB unless their layers are small.

``kv/ab/ab12…-5f3a09c1``: a copy of the header, then the layers, each at a multiple of 4 KiB. A
file is written, synced and renamed before the header that names it is committed, and removed after
the commit that deletes the header. A crash leaves at most a file that no header names.

Files of chunks that are being read stay open from one layer to the next: opening them for each
layer takes a third of the time of reading layers of 256 KiB. Layers that are not in the page cache
are requested from the disk in the order in which they will be read, and not far ahead: a disk works
on all requests at once, so that the first of many is late.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ragcache.store.base import Miss
from ragcache.store.format.codecs.base import Bytes
from ragcache.store.format.header import Payload
from ragcache.store.lmdb.directory import sync_folder

__all__ = ["PAGE"]

PAGE = 4096
_MAX_OPEN = 128  # files; the usual limit of a process is 1,024
_CAN_ADVISE = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")
_PART = ".part"
_HEX = 64  # digits of a digest
_sync = getattr(os, "fdatasync", os.fsync)


class _Open:
    """A file that is open for reading as long as this object is referenced, so that no reader uses
    a descriptor that was closed and reused for another file."""

    def __init__(self, path: str) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.cold = True  # as far as is known
        self._asked: set[int] = set()  # offsets

    def ask(self, payload: Payload) -> None:
        """Ask the kernel to read a layer ahead, once, unless the file is in the page cache."""
        offset, length, _ = payload
        if not self._asked:
            self.cold = _CAN_ADVISE and not _is_cached(self.handle, offset)
        if self.cold and offset not in self._asked:
            self._asked.add(offset)
            with suppress(OSError):  # only a hint
                os.posix_fadvise(self.handle, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class ChunkFiles:
    """Files of chunks below ``root``, which is made with the first file (0700, files 0600).

    Thread-safe.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._folder = root, str(root)
        self._lock = threading.Lock()
        self._holders: Counter[str] = Counter()  # by digest, in hex
        self._open: dict[str, _Open] = {}  # by name; of chunks that are held

    def new_name(self, digest: bytes) -> str:
        """A unique name: a chunk that is put again gets another file."""
        return f"{digest.hex()}-{secrets.token_hex(4)}"

    @contextmanager
    def create(self, name: str) -> Iterator[_FileWriter]:
        """Write a file. It exists, durably, once the context has ended without an error."""
        path = self._path(name)
        self.root.mkdir(mode=0o700, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part = path.with_name(name + _PART)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "wb", buffering=0) as file:
                yield _FileWriter(file)
                _sync(file.fileno())
            part.rename(path)
            for folder in (path.parent, self.root, self.root.parent):
                sync_folder(folder)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise

    @contextmanager
    def keep_open(self, digests: Iterable[bytes]) -> Iterator[None]:
        """Keep files of these chunks open once they were read from, until the context ends; at most
        :data:`_MAX_OPEN` files of all chunks."""
        held = [digest.hex() for digest in digests]
        with self._lock:
            self._holders.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._holders.subtract(held)
                self._holders += Counter()  # drops zeros
                for name in [one for one in self._open if one[:_HEX] not in self._holders]:
                    del self._open[name]

    def expect(self, name: str, payload: Payload) -> None:
        """Ask the kernel to read a layer that will be needed soon.

        Does nothing for a file whose first layer was in the page cache: the call takes a tenth of
        the time of copying from there.
        """
        file = self._open.get(name)
        if file is None or file.cold:
            with suppress(OSError):  # read() reports it
                (file or self._opened(name)).ask(payload)

    def read(self, name: str, payload: Payload, room: Bytes) -> Bytes | Miss:
        """The bytes of one layer, unchecked: the beginning of ``room``, into which they are read.

        A Miss where the file is gone, short or unreadable. Raises OSError where a limit of the
        process or machine is reached (open files, memory).
        """
        try:
            file = self._open.get(name) or self._opened(name)
        except FileNotFoundError:
            return Miss("truncated", f"its file {name[:12]}… is gone")
        try:
            offset, length, _ = payload
            raw, at = room[:length], 0
            while at < length and (more := os.preadv(file.handle, [raw.data[at:]], offset + at)):
                at += more
            if at < length:
                return Miss("truncated", f"its file ends {length - at} bytes early")
            return raw
        except OSError as error:
            return Miss("unreadable", f"its file cannot be read: {error}")

    def remove(self, name: str) -> None:
        """Remove a file that no header names. A failure is left to the next sweep."""
        with suppress(OSError):
            self._path(name).unlink()

    def names(self) -> Iterator[str]:
        """The names of all files of chunks, including unfinished ones."""
        for folder, name in self._there():
            if _is_ours(folder, name):
                yield name

    def strays(self) -> Iterator[str]:
        """Paths below ``root`` of all other files."""
        for folder, name in self._there():
            if not _is_ours(folder, name):
                yield f"{folder}/{name}" if folder else name

    def _there(self) -> Iterator[tuple[str, str]]:
        """Folder and name of every file below ``root``; "" for what is directly in it."""
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if re.fullmatch("[0-9a-f]{2}", folder.name) and folder.is_dir():
                    for name in sorted(os.listdir(folder)):
                        yield folder.name, name
                else:
                    yield "", folder.name

    def _opened(self, name: str) -> _Open:
        file = _Open(f"{self._folder}/{name[:2]}/{name}")
        with self._lock:
            if name[:_HEX] in self._holders and len(self._open) < _MAX_OPEN:
                return self._open.setdefault(name, file)
        return file

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / name


def file_digest(name: str) -> bytes:
    """The key digest of the chunk whose file has this name."""
    return bytes.fromhex(name[:_HEX])


def _is_ours(folder: str, name: str) -> bool:
    """Whether a file has a name and place that this module gives."""
    known = re.fullmatch(rf"[0-9a-f]{{{_HEX}}}-[0-9a-f]{{8}}({re.escape(_PART)})?", name)
    return known is not None and name[:2] == folder


class _FileWriter:
    """A file that is being written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0

    def skip(self, size: int) -> None:
        """Reserve space for a header of ``size`` bytes."""
        self._at = page_aligned(size)

    def append(self, raw: Bytes) -> int:
        """Write a layer; its offset."""
        offset = self._at
        self._write(raw.data, offset)
        self._at = page_aligned(offset + len(raw))
        return offset

    def finish(self, header: bytes) -> None:
        """Write the header at the beginning."""
        self._write(memoryview(header), 0)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)


def _is_cached(handle: int, offset: int) -> bool:
    """Whether a byte of a file can be read without waiting for the disk."""
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would block, or the file system does not support it
        return False


def page_aligned(size: int) -> int:
    """``size`` rounded up to a multiple of 4 KiB."""
    return -(-size // PAGE) * PAGE
