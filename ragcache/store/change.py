"""A commit over the chunks of a store on disk, and what is gone once it is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragcache.store import outbox
from ragcache.store.header import Header, decode_header, encode_header
from ragcache.store.index import account, digests_of, remove

if TYPE_CHECKING:
    from ragcache.store.tables import Transaction


class DiskChange:
    """A :class:`Change` of a store on disk; ``shared``: one whose remote is to be told."""

    def __init__(self, txn: Transaction, *, shared: bool = False) -> None:
        self.txn, self._shared = txn, shared
        self.gone: list[str] = []  # files that nothing names once this is committed
        self.forgotten: list[bytes] = []  # chunks that were taken out, but for those evicted

    def enter(self, header: Header) -> None:
        """Put in a chunk whose layers are written; there is none under its key."""
        self.txn.put("headers", header.key, encode_header(header))
        account(self.txn, header, 1)

    def forget(self, digest: bytes) -> bool:
        """Take a chunk out; True if it was there."""
        self.forgotten.append(digest)
        return self.evict(digest)

    def evict(self, digest: bytes) -> bool:
        """Take a chunk out that has to make room: its policy knows. True if it was there."""
        header = decode_header(self.txn.get("headers", digest) or b"")
        if isinstance(header, Header) and header.file:
            self.gone.append(header.file)
        return remove(self.txn, digest)

    def forget_content(self, content: bytes) -> int:
        if self._shared:
            outbox.forget(self.txn, content)
        return sum(map(self.forget, list(digests_of(self.txn, content))))

    def is_pinned(self, digest: bytes) -> bool:
        """Whether a chunk must not be evicted: a document pins it, or it is nowhere else yet."""
        header = decode_header(self.txn.get("headers", digest) or b"")
        if not isinstance(header, Header):
            return False
        pinned = next(self.txn.keys("pins", header.content), None) is not None
        return pinned or outbox.waits(self.txn, header.content, digest)
