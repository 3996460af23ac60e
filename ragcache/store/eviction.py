"""Eviction policies: which chunks a full store evicts first.

A :class:`Policy` gets keys, sizes and uses and never sees KV, so that the store and
:mod:`ragcache.sim.eviction` run the same ones. To add a policy, add its class and its line in
:data:`POLICIES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from ragcache.errors import ConfigError

__all__ = ["CacheEntry", "POLICIES", "Policy", "make_policy"]

_Key = TypeVar("_Key", bound=Hashable)


class Usage(NamedTuple):
    """How a chunk has been used. All policies keep this state, so that a store can change its
    policy."""

    last: float  # time of the last use, counted in uses of all chunks
    times: float  # number of uses, the put included
    worth: float  # sum of the worth of its hits
    clock: float  # the policy's clock at the last use


@dataclass(slots=True)
class CacheEntry:
    """A stored chunk, as a policy knows it."""

    size: int  # bytes
    cost: float  # of computing it again, in any unit
    use: Usage
    entry: int  # the number of its entry in the heap; those with other numbers are stale


class Policy(ABC, Generic[_Key]):
    """Orders the stored chunks by which is evicted first. Not thread-safe.

    Keys are opaque. :meth:`add`, :meth:`hit`, :meth:`evict` and :meth:`discard` take O(log n),
    amortised: stale entries of the heap are removed later.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.bytes = 0  # of all stored chunks
        self._chunks: dict[_Key, CacheEntry] = {}
        self._heap: list[tuple[float, float, int, _Key]] = []  # priority, last use, entry, key
        self._entries = 0
        self._last = 0.0
        self._clock = 0.0

    @abstractmethod
    def priority(self, key: _Key, held: CacheEntry) -> float:
        """The lowest is evicted first; of equals, the least recently used. Constant between two
        uses."""

    def add(self, key: _Key, size: int, cost: float) -> None:
        """A chunk was put. Replaces the one under ``key`` and its uses.

        Raises ValueError for a size below 1 byte, or a cost that is negative or not finite.
        """
        self._last += 1
        self.restore(key, size, cost, Usage(self._last, 1, 0, self._clock))

    def hit(self, key: _Key, worth: float = 1.0) -> None:
        """A chunk was served. Unknown keys are ignored.

        Raises ValueError for a worth that is negative or not finite.
        """
        if not 0 <= worth < math.inf:
            raise ValueError(f"a hit cannot be worth {worth}: give a finite number from 0")
        if (held := self._chunks.get(key)) is not None:
            self._last += 1
            use = held.use
            held.use = Usage(self._last, use.times + 1, use.worth + worth, self._clock)
            self._push(key, held)

    def evict(self, key: _Key) -> None:
        """A chunk was evicted. Unknown keys are ignored."""
        self.discard(key)

    def discard(self, key: _Key) -> None:
        """A chunk was deleted for another reason. Unknown keys are ignored."""
        if (held := self._chunks.pop(key, None)) is not None:
            self.bytes -= held.size

    def victims(self, need: int, spared: Container[_Key] = ()) -> list[_Key] | None:
        """The chunks to evict, in this order, to free ``need`` bytes. Evicts nothing itself.

        Never returns any of ``spared``; None where the others do not suffice. Takes O(log n) for
        every victim and for every spared chunk of a lower priority: where many are pinned, free
        more at once.
        """
        chosen: list[_Key] = []
        seen = []
        try:
            while need > 0 and self._heap:
                entry = heappop(self._heap)
                held = self._chunks.get(entry[3])
                if held is None or held.entry != entry[2]:
                    continue
                seen.append(entry)
                if entry[3] not in spared:
                    chosen.append(entry[3])
                    need -= held.size
        finally:
            for entry in seen:
                heappush(self._heap, entry)
        return None if need > 0 else chosen

    def held(self, key: _Key) -> CacheEntry:
        """Size, cost and use of a chunk, for :meth:`restore` of any policy. Read-only.

        Raises KeyError for an unknown key.
        """
        return self._chunks[key]

    def restore(self, key: _Key, size: int, cost: float, use: Usage) -> None:
        """Add a chunk that was stored before a restart, with its uses.

        Once all are restored, in any order, the order of eviction is the same as before, and the
        clock is that of the latest use. Raises ValueError as :meth:`add` does.
        """
        if size < 1 or not 0 <= cost < math.inf or not all(map(math.isfinite, use)):
            raise ValueError(f"a chunk of {size} bytes, cost {cost} and {use} cannot be ranked")
        self.discard(key)
        self._last, self._clock = max(self._last, use.last), max(self._clock, use.clock)
        self.bytes += size
        self._chunks[key] = held = CacheEntry(size, cost, use, 0)
        self._push(key, held)

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def _push(self, key: _Key, held: CacheEntry) -> None:
        self._entries += 1
        held.entry = self._entries
        heappush(self._heap, self._entry(key, held))
        if len(self._heap) > 2 * len(self._chunks) + 64:  # most entries are stale
            self._heap = [self._entry(key, held) for key, held in self._chunks.items()]
            heapify(self._heap)

    def _entry(self, key: _Key, held: CacheEntry) -> tuple[float, float, int, _Key]:
        return self.priority(key, held), held.use.last, held.entry, key


class LRU(Policy[_Key]):
    """Evicts the least recently used chunk first."""

    name: ClassVar[str] = "lru"

    def priority(self, key: _Key, held: CacheEntry) -> float:
        return 0.0


class PGDSF(Policy[_Key]):
    """Greedy dual size frequency: evicts the lowest clock + uses * cost / size first.

    Jin et al., RAGCache, arXiv:2404.12457. The clock rises to the priority of what is evicted,
    and a chunk has the clock of its last use, so that old uses count less and less. RAGCache
    averages the cost over the requests, in which a document follows different prefixes; here
    a chunk has one cost. A chunk that comes back after it was evicted counts from 1 again.
    """

    name: ClassVar[str] = "pgdsf"

    def priority(self, key: _Key, held: CacheEntry) -> float:
        return held.use.clock + held.use.times * held.cost / held.size

    def evict(self, key: _Key) -> None:
        if (held := self._chunks.get(key)) is not None:
            self._clock = max(self._clock, self.priority(key, held))
        super().evict(key)


class CraftScore(Policy[_Key]):
    """Evicts the chunk with the lowest sum of its hits' worth first.

    Agarwal et al., Cache-Craft, arXiv:2502.15734, where a hit is worth 1 / CFO: the less of the
    chunk had to be recomputed, the more. Nothing ages.
    """

    name: ClassVar[str] = "craft"

    def priority(self, key: _Key, held: CacheEntry) -> float:
        return held.use.worth


POLICIES: dict[str, type[Policy[Any]]] = {"lru": LRU, "pgdsf": PGDSF, "craft": CraftScore}


def make_policy(name: str) -> Policy[Any]:
    """A new policy called ``name``. Raises ConfigError where there is none."""
    if name not in POLICIES:
        raise ConfigError(f"eviction policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    return POLICIES[name]()
