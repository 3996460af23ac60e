"""Synchronises chunks in bulk between the disk here and a remote: ``push`` and ``pull``."""

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
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.header import Header
from ragcache.store.format.record import Record, TranscodeTarget, check_decodable, transcode
from ragcache.store.key import IN_CONTEXT
from ragcache.store.remote.bandwidth import MAX_REQUESTS
from ragcache.store.remote.bases import share_bases
from ragcache.store.remote.chunk_objects import ChunkObjects, content_of, digest_of
from ragcache.types import Progress

__all__ = ["SyncResult", "pull", "push"]

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_SOME = 4 * MAX_REQUESTS
_MOST_UNKNOWN = 1 << 30  # bytes of a pulled chunk of a model without a recorded shape
_Outcome = Literal["moved", "there", "damaged", "foreign", "no_room", "other"]


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The numbers of chunks by outcome."""

    moved: int = 0
    there: int = 0  # already at the destination
    damaged: int = 0  # not moved
    foreign: int = 0  # of another shape or codec than their model's, or another chunk: not moved
    no_room: int = 0  # beyond the quota of the disk
    other: int = 0  # not moved: variants, and copies in other codecs


def push(
    disk: DiskStore,
    objects: ChunkObjects,
    *,
    copies: Mapping[bytes, Sequence[TranscodeTarget]] | None = None,
    progress: Progress | None = None,
) -> SyncResult:
    """Send the chunks on disk that the remote lacks, and their ``copies`` by key digest.

    An object that exists is left alone: under one key there is only one KV. Variants are not sent.
    ``progress`` is called with (done, total). Raises RemoteError; call again to send the rest.
    """
    share_bases(objects.bucket, disk.tables.path)
    there = {digest_of(name) for name, _ in objects.names()}
    digests = list(disk.keys())
    send = partial(_sent, disk, objects, there, copies or {})
    return _moved(send, digests, progress)


def pull(
    disk: DiskStore,
    objects: ChunkObjects,
    *,
    contents: set[bytes] | None = None,
    codec: str = "raw",
    room: int | None = None,
    progress: Progress | None = None,
) -> SyncResult:
    """Store on disk the chunks of ``codec`` that the remote has and the disk lacks: those with
    ``contents``, by default all, up to ``room`` bytes.

    ``progress`` is called with (done, total). Raises RemoteError; call again to pull the rest.
    """
    share_bases(objects.bucket, disk.tables.path)
    left = float("inf") if room is None else room
    wanted, beyond = [], 0
    here = set(disk.keys())
    for name, size in objects.names():
        if contents is not None and content_of(name) not in contents:
            continue
        if digest_of(name) not in here and size > left:
            beyond += 1
            continue
        left -= 0 if digest_of(name) in here else size
        wanted.append(name)
    found = _moved(partial(_fetched, disk, objects, here, codec), wanted, progress)
    return replace(found, no_room=found.no_room + beyond)


def _sent(
    disk: DiskStore,
    objects: ChunkObjects,
    there: set[bytes],
    copies: Mapping[bytes, Sequence[TranscodeTarget]],
    digest: bytes,
) -> _Outcome:
    missing = [copy for copy in copies.get(digest, ()) if copy.key not in there]
    if digest in there and not missing:
        return "there"
    record = disk.record(digest)
    if isinstance(record, Miss):
        return "damaged"
    if record.header.mode.startswith(IN_CONTEXT):
        return "other"
    for copy in missing:
        objects.put(transcode(record, copy), replacing=False)
    return "moved" if objects.put(record, replacing=False) or missing else "there"


def _fetched(
    disk: DiskStore, objects: ChunkObjects, here: set[bytes], codec: str, name: str
) -> _Outcome:
    if digest_of(name) in here:
        return "there"
    others = Miss("stale", "its codec is another")

    def unwanted(header: Header) -> Miss | None:
        with disk.tables.read() as txn:
            if (miss := kv_shapes.check_shape(txn, header)) is not None:
                return miss
            known = kv_shapes.recorded_shape(txn, header.fingerprint) is not None
        if header.codec != codec:
            return others
        if not known and header.payload_bytes > _MOST_UNKNOWN:
            return Miss("foreign", f"{header.payload_bytes} bytes of a model that is not known")
        return None

    record = objects.record(name, unwanted)
    if record is None or record is others:  # deleted meanwhile
        return "other"
    if isinstance(record, Record):
        record = check_decodable(record) or record
    if isinstance(record, Miss):
        logger.warning("%s is not pulled, %s: %s", name, record.reason, record.detail)
        return "foreign" if record.reason == "foreign" else "damaged"
    try:
        return "moved" if disk.put_record(record) else "there"
    except FullError:
        return "no_room"


def _moved(
    move: Callable[[_Item], _Outcome], items: Sequence[_Item], progress: Progress | None
) -> SyncResult:
    counts = dict.fromkeys((field.name for field in fields(SyncResult)), 0)
    for done, outcome in enumerate(_side_by_side(move, items), 1):
        counts[outcome] += 1
        if progress is not None:
            progress(done, len(items))
    return SyncResult(**counts)


def _side_by_side(move: Callable[[_Item], _Outcome], items: Sequence[_Item]) -> Iterator[_Outcome]:
    """Move a few at a time; after a failure, no more are started."""
    with ThreadPoolExecutor(MAX_REQUESTS, "ragcache-move") as pool:
        for at in range(0, len(items), _SOME):
            yield from pool.map(move, items[at : at + _SOME])
