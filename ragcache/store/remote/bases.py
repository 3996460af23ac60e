"""Bases of the codec ``kvtc`` in a remote, so that machines which share it can share KV.

An object ``codecs/DIGEST.basis`` is the file of that name in a store: see
:mod:`ragcache.store.format.codecs.basis`.
"""

from __future__ import annotations

from pathlib import Path

from ragcache.store.base import Miss
from ragcache.store.format.codecs.basis import FOLDER, MOST_BYTES, Basis, bases_of
from ragcache.store.remote.object_store import Bucket, InvalidObjectError, ObjectRange

__all__ = ["share_bases"]


def share_bases(bucket: Bucket, store: Path) -> None:
    """Write the bases of the remote that the store lacks into it, and the other way round. A
    damaged one is left out, and replaced where its size shows it. Raises RemoteError, and
    StoreError if they cannot be written."""
    here = {one.file_name: one for one in bases_of(store)}
    there = {name.rpartition("/")[2]: (name, size) for name, size in bucket.list(FOLDER)}
    for file, (name, size) in there.items():
        if file in here or size > MOST_BYTES:
            continue
        try:
            found = bucket.get(name, 0, max(1, size), check=_parsed)
        except InvalidObjectError:
            continue
        if found is not None and found.file_name == file:
            found.write(store)
    for file, one in here.items():
        name, size = there.get(file, (f"{FOLDER}/{file}", -1))
        if size != len(one.data):
            if size >= 0:
                bucket.delete(name)
            bucket.put(name, one.data)


def _parsed(got: ObjectRange) -> Basis:
    try:
        return Basis.parse(bytes(got.data))
    except ValueError as error:
        raise InvalidObjectError(Miss("corrupt", str(error))) from error
