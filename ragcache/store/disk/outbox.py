"""What a remote is still to be told: rows that are committed with what they tell of.

A put, a deletion, or a document that goes changes the store and this table in one commit. So a
process may be killed at any point, and a remote may be out for any time: what was acknowledged is
told in the end. Rows are in the order in which they must be carried out, of any tokens:

===========================  =======================================================
content digest               forget all KV of these tokens; the value is drawn anew
content digest, key digest   nothing: delete this chunk. JSON: send it, and its levels
===========================  =======================================================
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
    """One thing to tell."""

    content: bytes
    digest: bytes | None  # None: of all KV of these tokens
    value: bytes  # another one each time that it is written

    @property
    def sends(self) -> bool:
        """Whether a chunk is to be sent, and not deleted."""
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
    """A chunk has been put."""
    fields = [[copy.codec, copy.key.hex(), copy.fingerprint.hex(), copy.name] for copy in copies]
    value = json.dumps({"version": f"{version:x}", "levels": fields}, separators=(",", ":"))
    txn.put(_TABLE, content + digest, value.encode())


def delete(txn: Transaction, content: bytes, digest: bytes) -> None:
    """A chunk has been deleted."""
    txn.put(_TABLE, content + digest, secrets.token_bytes(8).replace(b"{", b"}"))


def delete_content(txn: Transaction, content: bytes) -> None:
    """No document uses these tokens any more: drop what was still to be told of them."""
    for row in list(txn.keys(_TABLE, content)):
        txn.delete(_TABLE, row)
    txn.put(_TABLE, content, secrets.token_bytes(8))


def is_deleted(txn: Transaction, content: bytes, digest: bytes) -> bool:
    """Whether a remote's chunk counts as deleted, though it may not have been told yet."""
    value = txn.view(_TABLE, content + digest)
    if value is not None:
        return bytes(value[:1]) != b"{"
    return txn.view(_TABLE, content) is not None


def is_unsent(txn: Transaction, content: bytes, digest: bytes) -> bool:
    """Whether a chunk is still to be sent: it is nowhere else."""
    value = txn.view(_TABLE, content + digest)
    return value is not None and bytes(value[:1]) == b"{"


def first_rows(txn: Transaction, most: int, *, without: Container[bytes] = ()) -> list[OutboxRow]:
    """The first ``most`` rows that are to be told, of other contents than those of ``without``."""
    found = []
    keys = (key for key in txn.keys(_TABLE) if key[:DIGEST] not in without)
    for key in islice(keys, most):
        value = txn.get(_TABLE, key)
        assert value is not None
        found.append(OutboxRow(key[:DIGEST], key[DIGEST:] or None, value))
    return found


def remove(txn: Transaction, row: OutboxRow) -> None:
    """Remove a row that was told, unless another was written in its place meanwhile."""
    key = row.content + (row.digest or b"")
    if txn.get(_TABLE, key) == row.value:
        txn.delete(_TABLE, key)


def depth(txn: Transaction) -> int:
    """How much is still to be told: rows."""
    return txn.count(_TABLE)
