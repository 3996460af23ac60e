"""Order a list of questions so that chunks are reused while they are in RAM.

BatchLLM (Zheng et al., arXiv:2412.03594) groups requests that share a prefix. Here a chunk is
reusable at any position, so requests that share any chunks are grouped.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ragcache.sim.lru import K, LruSet

__all__ = ["order_by_chunks"]


def order_by_chunks(
    requests: Sequence[Sequence[K]], sizes: Mapping[K, int], capacity: int
) -> list[int]:
    """Indices of ``requests`` (the chunks of each) in an order for a RAM tier of ``capacity``
    bytes.

    Greedy: the next request is the one of least cost. A chunk that is not in RAM costs its bytes; a
    chunk in RAM costs minus its bytes over the number of waiting requests that use it, rounded down
    to a power of 2, so that chunks with few remaining uses are finished first. Ties are broken by
    index.
    """
    users: defaultdict[K, set[int]] = defaultdict(set)
    for number, chunks in enumerate(requests):
        for chunk in chunks:
            users[chunk].add(number)
    in_ram, order = LruSet(sizes, capacity), list[int]()
    weights = {chunk: _power(len(waiting)) for chunk, waiting in users.items()}

    def cost(number: int) -> float:
        return sum(
            -sizes[chunk] / weights[chunk] if chunk in in_ram else sizes[chunk]
            for chunk in dict.fromkeys(requests[number])
        )

    costs = {number: cost(number) for number in range(len(requests))}
    heap = [(least, number) for number, least in costs.items()]
    heapq.heapify(heap)
    while heap:
        least, number = heapq.heappop(heap)
        if costs.get(number) != least:
            continue  # an outdated entry: already ordered, or its cost has changed
        del costs[number]
        order.append(number)
        changed = set().union(*in_ram.use(requests[number]))
        for chunk in set(requests[number]):
            users[chunk].discard(number)
            if weights[chunk] != (weight := _power(len(users[chunk]))):
                weights[chunk] = weight
                changed.add(chunk)
        for user in set().union(*(users[chunk] for chunk in changed)):
            if costs[user] != (now := cost(user)):
                costs[user] = now
                heapq.heappush(heap, (now, user))
    return order


def _power(count: int) -> int:
    """The greatest power of 2 up to ``count``; at least 1."""
    return 1 << max(0, count.bit_length() - 1)


def loaded_bytes(
    requests: Sequence[Sequence[K]], order: Iterable[int], sizes: Mapping[K, int], capacity: int
) -> int:
    """Bytes that a RAM tier of ``capacity`` bytes loads for ``requests`` in this ``order``."""
    in_ram, total = LruSet(sizes, capacity), 0
    for number in order:
        total += sum(sizes[chunk] for chunk in set(requests[number]) if chunk not in in_ram)
        in_ram.use(requests[number])
    return total
