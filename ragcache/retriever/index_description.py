"""What is known of an index: its kind, its size, and how many of the nearest vectors it finds."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ragcache.retriever.index_file import UnusableFile, opened

__all__ = ["IndexDescription", "describe_index"]

APPROXIMATE = 3  # number of the kind of payload in an index file
_EXACT = {1: "numpy", 2: "flat"}
_HEAD = struct.Struct("<IQ")  # bytes of JSON, their xxh3_64
_MOST = 1 << 20  # bytes of JSON


@dataclass(frozen=True, slots=True)
class IndexDescription:
    """An index, as `ragcache stats` shows it. The last three are None for an exact index."""

    kind: str  # flat, numpy, hnsw, ivfpq, or a string for FAISS's index factory
    vectors: int
    recall: float  # share of the ten nearest of a stored vector that are found; 1 if exact
    floor: float | None = None  # the least recall that was asked for
    width: int | None = None  # how much is searched, doubled until the recall reached the floor
    measured: float | None = None  # when, in seconds since the epoch

    @property
    def is_below_floor(self) -> bool:
        return self.floor is not None and self.recall < self.floor


def describe_index(path: Path) -> IndexDescription | None:
    """The description of the index in a file, of which only the beginning is read; None where
    there is none that can be read."""
    try:
        with opened(path, verify=False) as (header, file):
            if header.kind in _EXACT:
                return IndexDescription(_EXACT[header.kind], header.vectors, 1.0)
            return read_notes(file)[0]
    except UnusableFile:
        return None


def write_notes(file: BinaryIO, description: IndexDescription, **notes: Any) -> None:
    """Append the description of an index, with further notes, to a file."""
    from xxhash import xxh3_64_intdigest

    text = json.dumps({"description": asdict(description), **notes}).encode()
    file.write(_HEAD.pack(len(text), xxh3_64_intdigest(text)) + text)


def read_notes(file: BinaryIO) -> tuple[IndexDescription, Mapping[str, Any]]:
    """What :func:`write_notes` wrote. Raises UnusableFile, also for what another release wrote."""
    from xxhash import xxh3_64_intdigest

    head = file.read(_HEAD.size)
    if len(head) == _HEAD.size:
        size, check = _HEAD.unpack(head)
        text = file.read(min(size, _MOST))
        if len(text) == size and xxh3_64_intdigest(text) == check:
            notes: dict[str, Any] = json.loads(text)
            with suppress(TypeError):  # other fields
                return IndexDescription(**notes.pop("description")), notes
    raise UnusableFile("its payload is not what it says")
