"""Simulate eviction policies on a trace: what a store of a given capacity would save.

A request is served from the chunks that are stored when it arrives. Then its other chunks are
stored, and chunks of other requests are evicted to make room. A chunk that does not fit beside the
request's other chunks is not stored. Duplicates within a request count once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ragcache.errors import ConfigError
from ragcache.planning.flops import ModelShape
from ragcache.sim.trace import Trace
from ragcache.store.eviction import POLICIES, CacheEntry, Policy, make_policy

__all__ = ["PolicyComparison", "compare_policies", "working_set_bytes"]


@dataclass(frozen=True, slots=True)
class PolicyOutcome:
    """The result of one policy on a trace, in a store of ``capacity`` bytes."""

    policy: str
    capacity: int
    requests: int
    chunks: int  # requested, over all requests
    tokens: int  # of these chunks
    flops: float  # to compute all of them
    hits: float = 0  # chunks served from the store; fractional for an upper bound
    hit_tokens: float = 0
    saved_flops: float = 0
    evictions: int = 0
    refused: int = 0  # chunks that did not fit beside the rest of their request

    @property
    def hit_rate(self) -> float:
        """Share of the requested chunks that were served from the store."""
        return self.hits / max(1, self.chunks)

    @property
    def token_rate(self) -> float:
        """Share of the requested tokens that were served from the store."""
        return self.hit_tokens / max(1, self.tokens)

    @property
    def saved(self) -> float:
        """Share of the chunks' FLOPs that were saved, without questions and recomputation."""
        return self.saved_flops / max(1, self.flops)


@dataclass(frozen=True, slots=True)
class PolicyComparison:
    """A row of :func:`compare_policies`."""

    outcome: PolicyOutcome
    of_belady: float  # saved FLOPs relative to ``belady``; can exceed 1 if chunk sizes differ


class _BeladyPolicy(Policy[str]):
    """Belady's algorithm: evicts the chunk whose next request is furthest in the future.

    If all chunks have the same size, and no request exceeds the store, no policy that stores every
    requested chunk has more hits (Belady, 1966). If sizes differ it is only a heuristic, and
    another policy may save more; :func:`_upper_bound` holds in any case.
    """

    name: ClassVar[str] = "belady"

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.now = 0  # the request that is being served
        self._requests: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(trace):
            for id, _ in request:
                self._requests[id].append(number)

    def priority(self, key: str, held: CacheEntry) -> float:
        requests = self._requests[key]
        later = bisect_right(requests, self.now)
        return -requests[later] if later < len(requests) else -math.inf


def simulate(trace: Trace, name: str, capacity: int, model: ModelShape) -> PolicyOutcome:
    """Replay ``trace`` under the policy ``name``, starting with an empty store.

    ``name`` is one of ``POLICIES``, ``belady`` or ``bound``. Raises ConfigError for other names,
    and for a capacity below 1 byte.
    """
    if capacity < 1:
        raise ConfigError(f"the capacity is {capacity} bytes: a store needs at least 1")
    if name == "bound":
        return _upper_bound(trace, capacity, model)
    chosen = _BeladyPolicy(trace) if name == _BeladyPolicy.name else make_policy(name)
    return _replay(trace, chosen, capacity, model)


def _replay(trace: Trace, policy: Policy[str], capacity: int, model: ModelShape) -> PolicyOutcome:
    hits = hit_tokens = evictions = refused = 0
    saved = 0.0
    for number, request in enumerate(trace):
        if isinstance(policy, _BeladyPolicy):
            policy.now = number
        sizes = dict(request)
        served = [id for id in sizes if id in policy]
        missing = [id for id in sizes if id not in policy]
        for id in served:
            policy.hit(id)
            hits, hit_tokens = hits + 1, hit_tokens + sizes[id]
            saved += model.flops(sizes[id])
        for id in missing:
            size = model.size(sizes[id])
            victims = policy.victims(policy.bytes + size - capacity, spared=sizes)
            if victims is None:
                refused += 1
                continue
            for victim in victims:
                policy.evict(victim)
            evictions += len(victims)
            policy.add(id, size, model.flops(sizes[id]))
    return replace(
        _empty_outcome(trace, policy.name, capacity, model),
        hits=hits,
        hit_tokens=hit_tokens,
        saved_flops=saved,
        evictions=evictions,
        refused=refused,
    )


def _upper_bound(trace: Trace, capacity: int, model: ModelShape) -> PolicyOutcome:
    """An upper bound on hits, tokens and FLOPs served by any policy, whatever the chunk sizes.

    PFOO-U (Berger et al., arXiv:1711.03709): to serve a chunk again, its bytes must stay stored
    from its previous request to this one. The store has capacity * (requests - 1) byte-requests,
    which are given to the reuses of most value per byte-request, at whatever time. Hits, tokens and
    FLOPs are bounded separately: a policy need not reach all three.
    """
    again: list[tuple[float, int, float]] = []  # byte-requests, tokens, FLOPs of each reuse
    previous: dict[str, int] = {}
    for number, request in enumerate(trace):
        for id, tokens in dict(request).items():
            if id in previous and (size := model.size(tokens)) <= capacity:
                again.append((size * (number - previous[id]), tokens, model.flops(tokens)))
            previous[id] = number
    room = capacity * (len(trace) - 1)
    return replace(
        _empty_outcome(trace, "bound", capacity, model),
        hits=_fill(room, [(need, 1) for need, _, _ in again]),
        hit_tokens=_fill(room, [(need, tokens) for need, tokens, _ in again]),
        saved_flops=_fill(room, [(need, flops) for need, _, flops in again]),
    )


def _fill(room: float, offers: Iterable[tuple[float, float]]) -> float:
    """The greatest value of ``offers`` (size, value) in ``room``: the fractional knapsack."""
    total = 0.0
    for size, value in sorted(offers, key=lambda offer: offer[0] / offer[1]):
        if size > room:
            return total + value * room / size
        total, room = total + value, room - size
    return total


def _empty_outcome(trace: Trace, name: str, capacity: int, model: ModelShape) -> PolicyOutcome:
    tokens = [count for request in trace for count in dict(request).values()]
    flops = sum(map(model.flops, tokens))
    return PolicyOutcome(name, capacity, len(trace), len(tokens), sum(tokens), flops)


def compare_policies(
    trace: Trace,
    model: ModelShape,
    capacities: Iterable[int],
    policies: Sequence[str] = tuple(POLICIES),
) -> list[PolicyComparison]:
    """For each capacity, a row for each of ``policies``, then for ``belady`` and ``bound``."""
    rows = []
    for capacity in capacities:
        names = (*policies, "belady", "bound")
        outcomes = [simulate(trace, name, capacity, model) for name in names]
        best = outcomes[-2].saved_flops
        rows += [PolicyComparison(o, o.saved_flops / best if best else math.nan) for o in outcomes]
    return rows


def working_set_bytes(trace: Trace, model: ModelShape) -> int:
    """Bytes of all chunks that are requested more than once; a larger store saves no more."""
    seen: set[str] = set()
    again: dict[str, int] = {}
    for request in trace:
        sizes = dict(request)
        again.update((id, tokens) for id, tokens in sizes.items() if id in seen)
        seen |= sizes.keys()
    return sum(map(model.size, again.values()))
