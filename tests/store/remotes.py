"""Stores over a remote for the tests: over a folder, in memory, and over a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragcache.store.disk.quota import UNBOUNDED, Quota
from ragcache.store.disk.store import DiskStore
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.object_store import Bucket, RetryPolicy
from ragcache.store.remote.store import RemoteStore

HASTY = RetryPolicy(first_s=0.001, longest_s=0.005, read_s=0.5, rest_s=0.05)


def over(
    path: Path,
    url: str = "",
    *,
    quota: Quota = UNBOUNDED,
    patience: RetryPolicy = HASTY,
    remote_codecs: Sequence[str] = (),
) -> RemoteStore:
    """A store on disk in ``path``, over the remote of that URL, or over a folder beside it."""
    bucket = Bucket(url or (path.parent / "remote").as_uri(), patience)
    disk = DiskStore(path, quota=quota)
    return RemoteStore(disk, ChunkObjects(bucket), remote_codecs=remote_codecs, patience_s=5.0)
