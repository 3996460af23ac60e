"""Chunks in files of their own, which are read faster than LMDB unless their layers are small.

``kv/ab/ab12…-5f3a09c1``: a copy of the header, then the layers, each at a multiple of 4 KiB. A
file is written whole, synced and given its name before the header that names it is committed, and
removed after the commit that forgets it. A crash leaves at most a file that no header names.

Files of chunks that are held stay open from one layer to the next: opening them for each took a
third of the time that layers of 256 KiB take. Where they have to come from the disk, it is asked
for them in the order in which they will be read, not far ahead: it works on all that it was asked
for, so the first of much would come late.
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

PAGE = 4096
_MAX_OPEN = 128  # files that are kept open: a process may often have no more than 1,024
_CAN_ADVISE = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")
_PART = ".part"
_HEX = 64  # digits of a digest
_sync = getattr(os, "fdatasync", os.fsync)


class _Open:
    """A file that is open for reading as long as anything refers to this object: no reader is left
    with a descriptor that has become another file's."""

    def __init__(self, path: str) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.cold = True  # as far as is known
        self._asked: set[int] = set()  # offsets

    def ask(self, payload: Payload) -> None:
        """Let the disk begin with a layer, once; of a file that turns out not to be cold, nothing
        is asked."""
        offset, length, _ = payload
        if not self._asked:
            self.cold = _CAN_ADVISE and not _is_cached(self.handle, offset)
        if self.cold and offset not in self._asked:
            self._asked.add(offset)
            with suppress(OSError):  # it is advice
                os.posix_fadvise(self.handle, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class ChunkFiles:
    """Files of chunks below ``root``, which is made with the first of them (0700, files 0600).

    Thread-safe.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._folder = root, str(root)
        self._lock = threading.Lock()
        self._holders: Counter[str] = Counter()  # by digest, in hex
        self._open: dict[str, _Open] = {}  # by name; of chunks that are held

    def new_name(self, digest: bytes) -> str:
        """A name that was never given: a chunk that is put again gets another file."""
        return f"{digest.hex()}-{secrets.token_hex(4)}"

    @contextmanager
    def create(self, name: str) -> Iterator[_FileWriter]:
        """Write a file; it is there, durably, once the ``with`` has ended, or not at all."""
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
        """While this lasts, files of these chunks stay open once they have been read from; of all
        chunks, at most :data:`_MAX_OPEN`."""
        held = [digest.hex() for digest in digests]
        with self._lock:
            self._holders.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._holders.subtract(held)
                self._holders += Counter()  # forgets those that nobody reads
                for name in [one for one in self._open if one[:_HEX] not in self._holders]:
                    del self._open[name]

    def expect(self, name: str, payload: Payload) -> None:
        """Say that a layer will soon be read: if the disk has to bring it, it begins now.

        It is asked for nothing of a file whose first layer was in the page cache: asking takes a
        tenth of the time that copying from there takes.
        """
        file = self._open.get(name)
        if file is None or file.cold:
            with suppress(OSError):  # what is wrong, whoever reads it will say
                (file or self._opened(name)).ask(payload)

    def read(self, name: str, payload: Payload, room: Bytes) -> Bytes | Miss:
        """The bytes of one layer, not checked yet: the beginning of ``room``, which holds them.

        What is wrong with the file is a Miss; OSError where the process or the machine is at its
        limits (open files, memory).
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
        """Remove a file that no header names; what cannot be removed is left for the next sweep."""
        with suppress(OSError):
            self._path(name).unlink()

    def names(self) -> Iterator[str]:
        """All files of chunks, those that were never finished too."""
        for folder, name in self._there():
            if _is_ours(folder, name):
                yield name

    def strays(self) -> Iterator[str]:
        """All else that somebody has put among them, by its path below ``root``."""
        for folder, name in self._there():
            if not _is_ours(folder, name):
                yield f"{folder}/{name}" if folder else name

    def _there(self) -> Iterator[tuple[str, str]]:
        """Everything below ``root``: folder and name. What is no folder has none."""
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
    """The digest of the chunk that one of our files belongs to."""
    return bytes.fromhex(name[:_HEX])


def _is_ours(folder: str, name: str) -> bool:
    """Whether a file is called as we call them, and where it belongs."""
    known = re.fullmatch(rf"[0-9a-f]{{{_HEX}}}-[0-9a-f]{{8}}({re.escape(_PART)})?", name)
    return known is not None and name[:2] == folder


class _FileWriter:
    """A file that is being written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0

    def skip(self, size: int) -> None:
        """Leave room for a header of ``size`` bytes."""
        self._at = page_aligned(size)

    def append(self, raw: Bytes) -> int:
        """Write a layer; its offset."""
        offset = self._at
        self._write(raw.data, offset)
        self._at = page_aligned(offset + len(raw))
        return offset

    def finish(self, header: bytes) -> None:
        """Write the header in front of the layers."""
        self._write(memoryview(header), 0)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)


def _is_cached(handle: int, offset: int) -> bool:
    """Whether a byte of a file can be read without waiting for the disk."""
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system cannot say
        return False


def page_aligned(size: int) -> int:
    """Where the next layer can begin, behind ``size`` bytes."""
    return -(-size // PAGE) * PAGE
