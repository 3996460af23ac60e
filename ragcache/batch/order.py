"""The order of a list of questions in which chunks that are in RAM are used while they are there.

BatchLLM (Zheng et al., arXiv:2412.03594) runs requests together that begin alike. Here a chunk is
used wherever it stands, so those that have chunks in common come together.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ragcache.sim.lru import K, LruSet


def order_by_chunks(
    requests: Sequence[Sequence[K]], sizes: Mapping[K, int], capacity: int
) -> list[int]:
    """Numbers of ``requests``, which are the chunks of each, for a tier of ``capacity`` bytes.

    Next is always the one with the fewest bytes to load; less, for each of its chunks that is held,
    the chunk's bytes by the number of requests that still wait for it, as a power of 2: what is
    nearly through is finished while it is there. Of equals, the first.
    """
    users: defaultdict[K, set[int]] = defaultdict(set)
    for number, chunks in enumerate(requests):
        for chunk in chunks:
            users[chunk].add(number)
    held, order = LruSet(sizes, capacity), list[int]()
    weights = {chunk: _power(len(waiting)) for chunk, waiting in users.items()}

    def cost(number: int) -> float:
        return sum(
            -sizes[chunk] / weights[chunk] if chunk in held else sizes[chunk]
            for chunk in dict.fromkeys(requests[number])
        )

    costs = {number: cost(number) for number in range(len(requests))}
    heap = [(least, number) for number, least in costs.items()]
    heapq.heapify(heap)
    while heap:
        least, number = heapq.heappop(heap)
        if costs.get(number) != least:
            continue  # it has been answered, or its cost has changed since
        del costs[number]
        order.append(number)
        changed = set().union(*held.use(requests[number]))
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
    """The greatest power of 2 that is at most ``count``, or 1."""
    return 1 << max(0, count.bit_length() - 1)


def loaded_bytes(
    requests: Sequence[Sequence[K]], order: Iterable[int], sizes: Mapping[K, int], capacity: int
) -> int:
    """Bytes that a tier of ``capacity`` bytes has to load for ``requests`` in that ``order``."""
    held, total = LruSet(sizes, capacity), 0
    for number in order:
        total += sum(sizes[chunk] for chunk in set(requests[number]) if chunk not in held)
        held.use(requests[number])
    return total
