"""References from indexed chunks to KV, by content, for all models; and which KV is pinned.

``uses`` and ``pins`` have a row for every content and every indexed chunk that uses it, to look up
the chunks of a content; ``used`` is the reverse, to look up the contents of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ragcache.store.catalog.chunks import row_key
from ragcache.store.key import DIGEST

if TYPE_CHECKING:
    from ragcache.store.base import Change
    from ragcache.store.lmdb.tables import Transaction


def add(txn: Transaction, row: int, content: bytes, *, pinned: bool) -> None:
    """Record that a row uses this content. ``pinned``: as its document is."""
    if not is_used(txn, row, content):
        txn.put("uses", content + row_key(row), b"")
        txn.put("used", row_key(row), (txn.get("used", row_key(row)) or b"") + content)
    _pin(txn, row, content, pinned)


def is_used(txn: Transaction, row: int, content: bytes) -> bool:
    """Whether the row uses this content."""
    return txn.view("uses", content + row_key(row)) is not None


def pin(txn: Transaction, row: int, pinned: bool) -> None:
    """Pin or unpin all contents of a row. A content stays pinned where another row pins it."""
    for content in _used_by(txn, row):
        _pin(txn, row, content, pinned)


def release(txn: Transaction, row: int) -> list[bytes]:
    """Remove all references of a row; the contents that it used."""
    used = _used_by(txn, row)
    for content in used:
        txn.delete("uses", content + row_key(row))
        txn.delete("pins", content + row_key(row))
    txn.delete("used", row_key(row))
    return used


def delete_unused(change: Change, contents: Iterable[bytes]) -> None:
    """Delete the KV of those ``contents`` that no row uses."""
    for content in contents:
        if not has_uses(change.txn, content):
            change.delete_content(content)


def has_uses(txn: Transaction, content: bytes) -> bool:
    """Whether any row uses this content."""
    return next(txn.keys("uses", content), None) is not None


def contents(txn: Transaction) -> set[bytes]:
    """All contents that any row uses."""
    return {row[:DIGEST] for row in txn.keys("uses")}


def _pin(txn: Transaction, row: int, content: bytes, pinned: bool) -> None:
    if pinned:
        txn.put("pins", content + row_key(row), b"")
    else:
        txn.delete("pins", content + row_key(row))


def _used_by(txn: Transaction, row: int) -> list[bytes]:
    used = txn.get("used", row_key(row)) or b""
    return [used[at : at + DIGEST] for at in range(0, len(used), DIGEST)]
