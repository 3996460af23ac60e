"""Chunks in bulk, between the disk here and a remote: whatever the one has and the other lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, TypeVar

from ragcache.errors import FullError
from ragcache.store.base import Miss
from ragcache.store.disk import kv_shapes
from ragcache.store.disk.outbox import Level
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.header import Header
from ragcache.store.format.record import Record, transcoded, undecodable
from ragcache.store.key import INCONTEXT
from ragcache.store.remote.bandwidth import AT_ONCE
from ragcache.store.remote.chunk_objects import ChunkObjects, content_of, digest_of
from ragcache.types import Progress

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_SOME = 4 * AT_ONCE
_MOST_UNKNOWN = 1 << 30  # bytes of a chunk that is pulled for a model that was never open here
Outcome = Literal["moved", "there", "damaged", "foreign", "no_room", "other"]


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of the chunks."""

    moved: int = 0
    there: int = 0  # where they were to go to
    damaged: int = 0  # and so not moved
    foreign: int = 0  # of another shape or codec than their model's, or another chunk: not moved
    no_room: int = 0  # within the quota of the disk
    other: int = 0  # variants, which stay here; KV in other codecs, which only the controller loads


def push(
    disk: DiskStore,
    objects: ChunkObjects,
    *,
    levels: Mapping[bytes, Sequence[Level]] | None = None,
    progress: Progress | None = None,
) -> Moved:
    """Write to the remote what is on disk and not there, with the ``levels`` of a key digest.

    What is there under a key stays, for it is the same KV. Variants stay here. ``progress`` is told
    (done, of how many). Raises RemoteError; a second call does the rest.
    """
    there = {digest_of(name) for name, _ in objects.names()}
    digests = list(disk.keys())
    send = partial(_sent, disk, objects, there, levels or {})
    return _moved(send, digests, progress)


def pull(
    disk: DiskStore,
    objects: ChunkObjects,
    *,
    contents: set[bytes] | None = None,
    codec: str = "raw",
    room: int | None = None,
    progress: Progress | None = None,
) -> Moved:
    """Put on disk what is in the remote and not here, of the tokens of these content digests, or of
    all; as long as there are ``room`` bytes for it.

    Only KV of ``codec``. ``progress`` is told (done, of how many). Raises RemoteError; a second
    call does the rest.
    """
    left = float("inf") if room is None else room
    wanted, later = [], 0
    here = set(disk.keys())
    for name, size in objects.names():
        if contents is not None and content_of(name) not in contents:
            continue
        if digest_of(name) not in here and size > left:
            later += 1
            continue
        left -= 0 if digest_of(name) in here else size
        wanted.append(name)
    found = _moved(partial(_fetched, disk, objects, here, codec), wanted, progress)
    return replace(found, no_room=found.no_room + later)


def _sent(
    disk: DiskStore,
    objects: ChunkObjects,
    there: set[bytes],
    levels: Mapping[bytes, Sequence[Level]],
    digest: bytes,
) -> Outcome:
    missing = [level for level in levels.get(digest, ()) if level.key not in there]
    if digest in there and not missing:
        return "there"
    record = disk.record(digest)
    if isinstance(record, Miss):
        return "damaged"
    if record.header.mode.startswith(INCONTEXT):
        return "other"
    for level in missing:
        objects.put(transcoded(record, level), replacing=False)
    return "moved" if objects.put(record, replacing=False) or missing else "there"


def _fetched(
    disk: DiskStore, objects: ChunkObjects, here: set[bytes], codec: str, name: str
) -> Outcome:
    if digest_of(name) in here:
        return "there"
    others = Miss("stale", "its codec is another")

    def unwanted(header: Header) -> Miss | None:
        with disk.tables.read() as txn:
            if (miss := kv_shapes.foreign(txn, header)) is not None:
                return miss
            known = kv_shapes.noted_of(txn, header.fingerprint) is not None
        if header.codec != codec:
            return others
        if not known and header.payload_bytes > _MOST_UNKNOWN:
            return Miss("foreign", f"{header.payload_bytes} bytes of a model that is not known")
        return None

    record = objects.record(name, unwanted)
    if record is None or record is others:  # deleted meanwhile
        return "other"
    if isinstance(record, Record):
        record = undecodable(record) or record
    if isinstance(record, Miss):
        logger.warning("%s is left where it is, %s: %s", name, record.reason, record.detail)
        return "foreign" if record.reason == "foreign" else "damaged"
    try:
        return "moved" if disk.enter(record) else "there"
    except FullError:
        return "no_room"


def _moved(
    move: Callable[[Item], Outcome], items: Sequence[Item], progress: Progress | None
) -> Moved:
    counts = dict.fromkeys((field.name for field in fields(Moved)), 0)
    for done, outcome in enumerate(_side_by_side(move, items), 1):
        counts[outcome] += 1
        if progress is not None:
            progress(done, len(items))
    return Moved(**counts)


def _side_by_side(move: Callable[[Item], Outcome], items: Sequence[Item]) -> Iterator[Outcome]:
    """Some at a time; none is begun after some have failed."""
    with ThreadPoolExecutor(AT_ONCE, "ragcache-move") as pool:
        for at in range(0, len(items), _SOME):
            yield from pool.map(move, items[at : at + _SOME])
