"""The order of requests: each once, with fewer bytes to load than in the given order."""

from __future__ import annotations

import random

from ragcache.batch.order import loaded_bytes, order_by_chunks
from ragcache.sim.lru import LruSet
from ragcache.sim.trace import zipf_trace


def slow(requests: list[list[int]], sizes: dict[int, int], capacity: int) -> list[int]:
    """The same rule, looked up anew for every request."""
    held, order, waiting = LruSet(sizes, capacity), list[int](), set(range(len(requests)))

    def cost(number: int) -> float:
        total = 0.0
        for chunk in dict.fromkeys(requests[number]):
            users = sum(chunk in requests[other] for other in waiting)
            power = max(2**n for n in range(9) if 2**n <= users)
            total += -sizes[chunk] / power if chunk in held else sizes[chunk]
        return total

    while waiting:
        number = min(waiting, key=lambda n: (cost(n), n))
        waiting.remove(number)
        order.append(number)
        held.use(requests[number])
    return order


def test_it_is_the_rule() -> None:
    rng = random.Random(0)
    for _ in range(30):
        sizes = {chunk: rng.randint(1, 9) for chunk in range(20)}
        requests = [rng.choices(range(20), k=rng.randint(0, 5)) for _ in range(25)]
        capacity = rng.choice((0, 5, 20, 60))
        order = order_by_chunks(requests, sizes, capacity)
        assert order == slow(requests, sizes, capacity)
        assert sorted(order) == list(range(25))


def test_less_is_loaded_on_a_zipf_workload() -> None:
    trace = zipf_trace(1000, 500, per_request=4)
    requests = [[asked.id for asked in request] for request in trace]
    sizes = {asked.id: asked.tokens for request in trace for asked in request}
    capacity = sum(sizes.values()) // 10
    given = loaded_bytes(requests, range(len(requests)), sizes, capacity)
    assert (
        loaded_bytes(requests, order_by_chunks(requests, sizes, capacity), sizes, capacity)
        < 0.6 * given
    )


def test_all_that_is_held_fits_and_goes_by_last_use() -> None:
    held = LruSet({"a": 2, "b": 2, "c": 2, "large": 9}, 4)
    assert held.use("ab") == (["a", "b"], [])
    assert held.use("ac") == (["c"], ["b"])
    assert held.use(["large"]) == ([], []) and "a" in held and "b" not in held
    assert held.use("bab") == (["b"], ["c"])  # a went for b, and b for nothing: a came back
