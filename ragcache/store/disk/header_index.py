"""Headers by key, and what is derived from them: the keys of each content, and totals.

Derived tables change in the same transaction as the headers; :func:`rebuild_index` rebuilds them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ragcache.store.base import ABSENT, Miss, stale_miss
from ragcache.store.format.header import Header, decode_header
from ragcache.store.key import DIGEST

if TYPE_CHECKING:
    from ragcache.store.key import ChunkKey
    from ragcache.store.lmdb.tables import Tables, Transaction

_PAGE = 1000  # digests listed per read transaction
_TOTAL = struct.Struct("<QQ")


def find_header(txn: Transaction, key: ChunkKey) -> Header | Miss:
    """The header under ``key``, or a Miss: *stale* where the same tokens have another key."""
    record = txn.get("headers", key.digest)
    if record is None:
        return _absent(txn, key)
    header = decode_header(record)
    if isinstance(header, Miss):
        return header
    return header.foreign(key) or header


def all_digests(tables: Tables) -> Iterator[bytes]:
    """Digests of all chunks, in byte order. Chunks that are put or deleted during the iteration may
    or may not appear."""
    start = b""
    while True:
        with tables.read() as txn:
            page = list(islice(txn.keys("headers", start=start), _PAGE))
        yield from page
        if len(page) < _PAGE:
            return
        start = page[-1] + b"\0"


def digests_of_content(txn: Transaction, content: bytes) -> Iterator[bytes]:
    """Key digests of the chunks with this content digest, in byte order."""
    for row in txn.keys("contents", content):
        yield row[DIGEST:]


def remove_chunk(txn: Transaction, digest: bytes) -> bool:
    """Remove a chunk from all tables, but not its file; True if it was there."""
    record = txn.get("headers", digest)
    for row in list(txn.keys("layers", digest)):
        txn.delete("layers", row)
    txn.delete("variants", digest)
    txn.delete("usage", digest)
    if record is None:
        return False
    txn.delete("headers", digest)
    header = decode_header(record)
    if isinstance(header, Header) and header.key == digest:
        update_index(txn, header, -1)
    else:  # the header does not say what it was counted under
        rebuild_index(txn)
    return True


def update_index(txn: Transaction, header: Header, sign: int) -> None:
    """Add a chunk to contents and totals (``sign`` 1), or remove it (-1)."""
    row = header.content + header.key
    if sign > 0:
        txn.put("contents", row, b"")
    else:
        txn.delete("contents", row)
    record = txn.get("totals", header.fingerprint) or _TOTAL.pack(0, 0)
    chunks, payload = _TOTAL.unpack_from(record)
    chunks += sign
    payload += sign * header.payload_bytes
    if chunks > 0 and payload >= 0:
        total = _TOTAL.pack(chunks, payload) + header.name.encode()
        txn.put("totals", header.fingerprint, total)
    else:
        txn.delete("totals", header.fingerprint)


def read_totals(txn: Transaction) -> Iterator[tuple[int, int, str]]:
    """Chunks, payload bytes and printable name of every fingerprint."""
    for _, record in txn.items("totals"):
        chunks, payload = _TOTAL.unpack_from(record)
        yield chunks, payload, record[_TOTAL.size :].decode(errors="replace")


def rebuild_index(txn: Transaction) -> None:
    """Rebuild contents and totals from the headers."""
    txn.clear("contents")
    txn.clear("totals")
    for digest in list(txn.keys("headers")):
        header = decode_header(txn.get("headers", digest) or b"")
        if isinstance(header, Header) and header.key == digest:
            update_index(txn, header, 1)


def _absent(txn: Transaction, key: ChunkKey) -> Miss:
    for digest in digests_of_content(txn, key.content):
        other = decode_header(txn.get("headers", digest) or b"")
        if isinstance(other, Header):
            return stale_miss(key, other.name, other.mode)
    return ABSENT
