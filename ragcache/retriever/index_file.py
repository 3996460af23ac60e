"""The file format of a vector index: a header, a checksum and a payload.

Little-endian::

    0   8   magic  "RAGVEC\\r\\n"
    8   2   version of this layout
    10  2   kind of payload: 1 numpy, 2 flat FAISS, 3 approximate FAISS
    12  4   dimension
    16  8   generation of the catalog that the vectors were taken from
    24  8   number of vectors
    32  8   bytes of payload
    40  8   xxh3_64 of bytes 0 to 39 and the payload
    48      payload

A payload is written and read in pieces, because it may be larger than the memory that is left.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAGIC = b"RAGVEC\r\n"
_VERSION = 1
_HEAD = struct.Struct("<8sHHIQQQ")
_CHECK = struct.Struct("<Q")
_START = _HEAD.size + _CHECK.size
_PIECE = 1 << 20  # bytes read at once for the checksum
_ABANDONED_S = 3600.0  # age from which a temporary file counts as left by a killed process


class IndexHeader(NamedTuple):
    """What the payload contains."""

    kind: int
    dimension: int
    generation: int
    vectors: int
    size: int = 0  # bytes of payload; set by :func:`write`


class UnusableFile(Exception):
    """A file cannot be used. The message says why, of "it"."""


def write(path: Path, header: IndexHeader, payload: Callable[[BinaryIO], object]) -> None:
    """Replace the file atomically, with mode 0600; durable on return. ``payload`` writes the
    payload to the file that it is given.

    A concurrent reader, or one after a crash, sees the whole old file or the whole new one.
    Temporary files that killed processes left are removed when they are an hour old. Raises
    OSError, and then leaves the old file in place.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - _ABANDONED_S:
                left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "w+b") as file:
            file.write(bytes(_START))
            payload(file)
            size = file.tell() - _START
            head = _HEAD.pack(_MAGIC, _VERSION, *header._replace(size=size))
            file.seek(0)
            file.write(head)
            check = _checksum(head, file)
            file.seek(_HEAD.size)
            file.write(_CHECK.pack(check))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def opened(path: Path, *, verify: bool = True) -> Iterator[tuple[IndexHeader, BinaryIO]]:
    """The header, and the file at the start of its payload, which ends with the file.

    Raises UnusableFile unless the file is whole. Without ``verify``, the checksum, for which the
    whole file is read, is not looked at.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UnusableFile(f"it cannot be read: {error.strerror}") from error
    with file:
        try:
            header = _verified(file, verify)
        except OSError as error:
            raise UnusableFile(f"it cannot be read: {error.strerror}") from error
        yield header, file


def _verified(file: BinaryIO, verify: bool) -> IndexHeader:
    """The header of a file, which is then at the start of its payload."""
    start, length = file.read(_START), os.fstat(file.fileno()).st_size
    if len(start) < _START or not start.startswith(_MAGIC):
        raise UnusableFile("it is not an index")
    _, version, *fields = _HEAD.unpack_from(start)
    if version != _VERSION:
        raise UnusableFile(f"it has layout {version}, not {_VERSION}")
    header = IndexHeader(*fields)
    if length != _START + header.size:
        raise UnusableFile(f"it has {length} bytes instead of {_START + header.size}")
    if verify and _CHECK.unpack_from(start, _HEAD.size)[0] != _checksum(start[: _HEAD.size], file):
        raise UnusableFile("its checksum does not match")
    file.seek(_START)
    return header


def _checksum(head: bytes, file: BinaryIO) -> int:
    """Of the head and of the payload in the file."""
    from xxhash import xxh3_64

    check = xxh3_64(head)
    file.seek(_START)
    while piece := file.read(_PIECE):
        check.update(piece)
    return check.intdigest()
