"""The file format of a vector index: a header, a checksum and a payload.

Little-endian::

    0   8   magic  "RAGVEC\\r\\n"
    8   2   version of this layout
    10  2   kind of payload: 1 numpy, 2 FAISS
    12  4   dimension
    16  8   generation of the catalog that the vectors were taken from
    24  8   number of vectors
    32  8   bytes of payload
    40  8   xxh3_64 of bytes 0 to 39 and the payload
    48      payload
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"RAGVEC\r\n"
_VERSION = 1
_HEAD = struct.Struct("<8sHHIQQQ")
_CHECK = struct.Struct("<Q")


class IndexHeader(NamedTuple):
    """What the payload contains."""

    kind: int
    dimension: int
    generation: int
    vectors: int


def write(path: Path, meta: IndexHeader, payload: bytes) -> None:
    """Replace the file atomically, with mode 0600; durable on return.

    A concurrent reader, or one after a crash, sees the whole old file or the whole new one. Raises
    OSError, and then leaves the old file in place.
    """
    head = _HEAD.pack(_MAGIC, _VERSION, *meta, len(payload))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            for part in (head, _CHECK.pack(_checksum(head, payload)), payload):
                file.write(part)
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


def read(path: Path) -> tuple[IndexHeader, memoryview] | str:
    """What :func:`write` wrote, or the reason why the file cannot be used. Never raises."""
    try:
        raw = memoryview(path.read_bytes())
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    start = _HEAD.size + _CHECK.size
    if len(raw) < start or raw[: len(_MAGIC)] != _MAGIC:
        return "it is not an index"
    _, version, kind, dimension, generation, count, size = _HEAD.unpack_from(raw)
    if version != _VERSION:
        return f"it has layout {version}, not {_VERSION}"
    if len(raw) != start + size:
        return f"it has {len(raw)} bytes instead of {start + size}"
    (check,) = _CHECK.unpack_from(raw, _HEAD.size)
    if check != _checksum(raw[: _HEAD.size], raw[start:]):
        return "its checksum does not match"
    return IndexHeader(kind, dimension, generation, count), raw[start:]


def _checksum(head: bytes | memoryview, payload: bytes | memoryview) -> int:
    from xxhash import xxh3_64

    check = xxh3_64(head)
    check.update(payload)
    return check.intdigest()
