"""The outbox: pending writes to a remote, committed together with the changes they follow from.

A put or a deletion changes the store and this table in one commit. So every acknowledged change
reaches the remote in the end, even if the process is killed or the remote is down for a while. Rows
with the same content must be carried out in the order of their keys:

===========================  =====================================================================
content digest               delete all KV with this content; the value is random
content digest, key digest   JSON: send this chunk, and its copies in other codecs; else delete it
===========================  =====================================================================
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Container, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ragcache.store.format.record import TranscodeTarget
from ragcache.store.key import DIGEST

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_TABLE = "outbox"


class OutboxRow(NamedTuple):
    """A pending write."""

    content: bytes
    digest: bytes | None  # of the key; None: all KV with this content
    value: bytes  # differs each time the row is written

    @property
    def sends(self) -> bool:
        """Whether the chunk is sent, not deleted."""
        return self.digest is not None and self.value.startswith(b"{")

    @property
    def copies(self) -> list[TranscodeTarget]:
        """The copies in other codecs that are sent with the chunk."""
        found = json.loads(self.value)["levels"] if self.sends else []
        return [TranscodeTarget(c, bytes.fromhex(k), bytes.fromhex(f), n) for c, k, f, n in found]


def send(
    txn: Transaction,
    content: bytes,
    digest: bytes,
    version: int,
    copies: Sequence[TranscodeTarget],
) -> None:
    """Add that a chunk was put."""
    fields = [[copy.codec, copy.key.hex(), copy.fingerprint.hex(), copy.name] for copy in copies]
    value = json.dumps({"version": f"{version:x}", "levels": fields}, separators=(",", ":"))
    txn.put(_TABLE, content + digest, value.encode())


def delete(txn: Transaction, content: bytes, digest: bytes) -> None:
    """Add that a chunk was deleted."""
    txn.put(_TABLE, content + digest, secrets.token_bytes(8).replace(b"{", b"}"))


def delete_content(txn: Transaction, content: bytes) -> None:
    """Add that all KV with this content was deleted; drops its other pending writes."""
    for row in list(txn.keys(_TABLE, content)):
        txn.delete(_TABLE, row)
    txn.put(_TABLE, content, secrets.token_bytes(8))


def is_deleted(txn: Transaction, content: bytes, digest: bytes) -> bool:
    """Whether a chunk was deleted, while the remote may still have it."""
    value = txn.view(_TABLE, content + digest)
    if value is not None:
        return bytes(value[:1]) != b"{"
    return txn.view(_TABLE, content) is not None


def is_unsent(txn: Transaction, content: bytes, digest: bytes) -> bool:
    """Whether a chunk is still to be sent, so that the only copy is here."""
    value = txn.view(_TABLE, content + digest)
    return value is not None and bytes(value[:1]) == b"{"


def first_rows(txn: Transaction, most: int, *, without: Container[bytes] = ()) -> list[OutboxRow]:
    """The first ``most`` rows whose contents are not in ``without``."""
    found = []
    keys = (key for key in txn.keys(_TABLE) if key[:DIGEST] not in without)
    for key in islice(keys, most):
        value = txn.get(_TABLE, key)
        assert value is not None
        found.append(OutboxRow(key[:DIGEST], key[DIGEST:] or None, value))
    return found


def remove(txn: Transaction, row: OutboxRow) -> None:
    """Remove a row that was carried out, unless it was written again since."""
    key = row.content + (row.digest or b"")
    if txn.get(_TABLE, key) == row.value:
        txn.delete(_TABLE, key)


def depth(txn: Transaction) -> int:
    """The number of rows."""
    return txn.count(_TABLE)
