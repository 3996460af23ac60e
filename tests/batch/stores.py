"""The contents of a store, for a bitwise comparison with another one."""

from __future__ import annotations

from pathlib import Path

from ragcache.store import DiskStore
from ragcache.store.format.header import Header, decode_header


def contents(path: Path) -> dict[bytes, tuple[object, ...]]:
    """Of every chunk its tokens, its sensitivity and the checksums of its layers, which are those
    of its bytes; what a put draws (its version, its file's name) is left out."""
    with DiskStore(path, readonly=True) as store:
        assert store.verify() == {}
        found = dict[bytes, tuple[object, ...]]()
        with store.tables.read() as txn:
            for digest, record in txn.items("headers"):
                header = decode_header(record)
                assert isinstance(header, Header)
                sums = tuple((p.length, p.checksum) for p in header.payloads)
                found[digest] = header.tokens, header.sensitivity, sums
    return found
