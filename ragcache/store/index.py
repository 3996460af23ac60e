"""What is kept beside the chunks: which keys hold the same tokens, and counts per fingerprint.

Both follow from the headers and change in the same transaction; ``reindex`` makes them again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ragcache.store.header import Header, decode_header

if TYPE_CHECKING:
    from ragcache.store.tables import Transaction

_TOTAL = struct.Struct("<QQ")


def remove(txn: Transaction, digest: bytes) -> bool:
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
        account(txn, header, -1)
    else:  # it cannot say what it was counted under
        reindex(txn)
    return True


def account(txn: Transaction, header: Header, sign: int) -> None:
    """Enter a chunk into the index and the totals (``sign`` 1), or take it out (-1)."""
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


def totals(txn: Transaction) -> Iterator[tuple[int, int, str]]:
    """Chunks, payload bytes and printable name of every fingerprint."""
    for _, record in txn.items("totals"):
        chunks, payload = _TOTAL.unpack_from(record)
        yield chunks, payload, record[_TOTAL.size :].decode(errors="replace")


def reindex(txn: Transaction) -> None:
    """Make index and totals again from the headers."""
    txn.clear("contents")
    txn.clear("totals")
    for digest in list(txn.keys("headers")):
        header = decode_header(txn.get("headers", digest) or b"")
        if isinstance(header, Header) and header.key == digest:
            account(txn, header, 1)
