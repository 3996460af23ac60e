"""Quotas of a store: how its chunks are used, and which are evicted."""

from __future__ import annotations

import math
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.errors import FullError
from ragcache.store.eviction import Policy, Usage, make_policy
from ragcache.store.format.header import Header, decode_header

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

__all__ = ["Quota", "UNBOUNDED"]

_ROW = struct.Struct("<4d")  # Use
_NEVER = Usage(0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Quota:
    """The bytes of KV that a store may hold in all, and per tenant; None for no limit."""

    total: int | None = None
    tenant: int | None = None


UNBOUNDED = Quota()


class Capacity:
    """Orders the chunks of a store for eviction, per tenant. Thread-safe.

    Uses are stored in the table ``usage``; those since the last change of the store are lost if the
    process is killed. A full store evicts from the tenant that holds most.
    """

    def __init__(self, quota: Quota, policy_name: str) -> None:
        make_policy(policy_name)  # raises ConfigError
        self.quota, self.policy_name = quota, policy_name
        self.evictions = 0
        self._policies: dict[str, Policy[bytes]] = {}
        self._tenants: dict[bytes, str] = {}
        self._leased: Counter[bytes] = Counter()
        self._dirty: set[bytes] = set()
        self._loaded = False
        self._early: list[tuple[bytes, float]] = []  # uses before :meth:`load`
        self._lock = threading.RLock()

    def load(self, txn: Transaction) -> None:
        """Load the stored chunks and their uses, then apply those counted before. A chunk without a
        row was never used."""
        for digest in txn.keys("headers"):
            header = decode_header(txn.get("headers", digest) or b"")
            if isinstance(header, Header):
                self._tenants[digest] = header.tenant
                one = self._of(header.tenant)
                use = _use(txn.get("usage", digest) or b"")
                one.restore(digest, header.payload_bytes, _cost(header), use)
        with self._lock:
            self._loaded, early, self._early = True, self._early, []
        for digest, worth in early:
            self.hit(digest, worth)

    @property
    def has_unsaved_uses(self) -> bool:
        """Whether there are uses for :meth:`save` to write."""
        return bool(self._dirty or self._early)

    def save(self, txn: Transaction) -> None:
        """Write the uses since the last call."""
        with self._lock:
            for digest in self._dirty:
                if (tenant := self._tenants.get(digest)) is not None:
                    txn.put("usage", digest, _ROW.pack(*self._of(tenant).held(digest).use))
            self._dirty.clear()

    def hit(self, digest: bytes, worth: float = 1.0) -> None:
        """A chunk was served."""
        with self._lock:
            if not self._loaded:
                self._early.append((digest, worth))
            elif (tenant := self._tenants.get(digest)) is not None:
                self._of(tenant).hit(digest, worth)
                self._dirty.add(digest)

    @contextmanager
    def lease(self, digests: Iterable[bytes]) -> Iterator[None]:
        """Keep chunks from being evicted until the context ends."""
        held = list(digests)
        with self._lock:
            self._leased.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._leased.subtract(held)
                self._leased += Counter()  # drops zeros

    @contextmanager
    def making_room(
        self, header: Header, pinned: Callable[[bytes], bool], instead_of: bytes | None = None
    ) -> Iterator[list[bytes]]:
        """Choose what to evict for a new chunk, in the same commit, in which it replaces the one
        under its key, and ``instead_of``.

        No lease begins while the context lasts. When it ends without an error, the chunk counts as
        stored and the others as evicted. Raises FullError, before anything changes, where not
        enough can be evicted.
        """
        with self._lock:
            victims = self._room(header, pinned, {header.key, instead_of or header.key})
            yield victims
            for victim in victims:
                self._of(self._tenants.pop(victim)).evict(victim)
            self.evictions += len(victims)
            self.discard(header.key)
            self._tenants[header.key] = header.tenant
            self._of(header.tenant).add(header.key, header.payload_bytes, _cost(header))
            self._dirty.add(header.key)

    def discard(self, digest: bytes) -> None:
        """A chunk was deleted."""
        with self._lock:
            if (tenant := self._tenants.pop(digest, None)) is not None:
                self._of(tenant).discard(digest)

    def _room(
        self, header: Header, pinned: Callable[[bytes], bool], replaced: set[bytes]
    ) -> list[bytes]:
        tenant = header.tenant
        sizes = {name: one.bytes for name, one in self._policies.items()}
        for digest in replaced:
            if (mine := self._tenants.get(digest)) is not None:
                sizes[mine] -= self._of(mine).held(digest).size
        sizes[tenant] = sizes.get(tenant, 0) + header.payload_bytes
        spared = _Spared(self._leased, pinned, replaced)

        def take(name: str, need: int = 1) -> bool:
            found = self._of(name).victims(need, spared)
            for victim in found or ():
                spared.chosen[victim] = None
                sizes[name] -= self._of(name).held(victim).size
            return bool(found)

        if self.quota.tenant is not None and (need := sizes[tenant] - self.quota.tenant) > 0:
            if not take(tenant, need):
                raise _full(self.quota.tenant, f"tenant {tenant!r}", sizes[tenant])
        if self.quota.total is not None:
            while (need := sum(sizes.values()) - self.quota.total) > 0:
                if len(sizes) == 1:
                    fits = take(tenant, need)
                else:
                    fits = any(map(take, sorted(sizes, key=lambda name: -sizes[name])))
                if not fits:
                    raise _full(self.quota.total, "the store", sum(sizes.values()))
        return list(spared.chosen)

    def _of(self, tenant: str) -> Policy[bytes]:
        if tenant not in self._policies:
            self._policies[tenant] = make_policy(self.policy_name)
        return self._policies[tenant]


def _use(row: bytes) -> Usage:
    """The use in a row of ``usage``; never used for a damaged or missing row."""
    use = Usage(*_ROW.unpack(row)) if len(row) == _ROW.size else _NEVER
    return use if all(map(math.isfinite, use)) else _NEVER


def _cost(header: Header) -> float:
    """The cost of computing a chunk again: its tokens. A prefill's FLOPs are about proportional to
    them as long as the chunk is short compared with the model's width."""
    return float(len(header.tokens))


class _Spared:
    """The chunks that must not be evicted: leased and pinned ones, the new one, and those already
    chosen."""

    def __init__(
        self, held: Counter[bytes], pinned: Callable[[bytes], bool], coming: set[bytes]
    ) -> None:
        self.held, self.pinned, self.coming = held, pinned, coming
        self.chosen: dict[bytes, None] = {}

    def __contains__(self, digest: object) -> bool:
        assert isinstance(digest, bytes)
        known = digest in self.coming or digest in self.chosen or digest in self.held
        return known or self.pinned(digest)


def _full(quota: int, whose: str, size: int) -> FullError:
    return FullError(
        f"{whose} may hold {quota} bytes of KV and would hold {size} with this chunk, and nothing "
        "more may go: all else is pinned or being read. Raise max_bytes, or unpin documents"
    )
