"""What a store of a given size would save: a trace of requests under every eviction policy.

A request is served from what is there when it comes; then its other chunks are stored, and what
must make room for them is evicted, never a chunk of the request itself. A chunk that does not fit
beside those is not stored. A chunk that a request names twice counts once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ragcache.errors import ConfigError
from ragcache.planning.flops import Model
from ragcache.sim.trace import Trace
from ragcache.store.eviction import POLICIES, CacheEntry, Policy, make_policy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy served of a trace, in a store of ``capacity`` bytes."""

    policy: str
    capacity: int
    requests: int
    chunks: int  # asked for, over all requests
    tokens: int  # of these chunks
    flops: float  # to compute them all
    hits: float = 0  # chunks served; a bound may be a fraction
    hit_tokens: float = 0
    saved_flops: float = 0
    evictions: int = 0
    refused: int = 0  # chunks not stored: too large for what the rest of the request leaves

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.chunks)

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / max(1, self.tokens)

    @property
    def saved(self) -> float:
        """Share of the FLOPs of all chunks; questions and repairs are not counted."""
        return self.saved_flops / max(1, self.flops)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of :func:`report`."""

    outcome: Outcome
    of_belady: float  # saved FLOPs over those of ``belady``; may exceed 1 where sizes differ


class Farthest(Policy[str]):
    """Belady's rule: what is asked for last, or never again, goes first. It knows the trace.

    Where all chunks are equally large, and no request larger than the store, no policy that stores
    what it is asked for has more hits (Belady, 1966). Where sizes differ it is only a good rule:
    another may save more. :func:`bound` holds then too.
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


def simulate(trace: Trace, name: str, capacity: int, model: Model) -> Outcome:
    """What the policy ``name`` serves of ``trace``, from a store that is empty at first.

    ``name`` is one of ``POLICIES``, or ``belady``, or ``bound``. Raises ConfigError for another,
    or for a capacity below 1 byte.
    """
    if capacity < 1:
        raise ConfigError(f"the capacity is {capacity} bytes: a store needs at least 1")
    if name == "bound":
        return bound(trace, capacity, model)
    chosen = Farthest(trace) if name == Farthest.name else make_policy(name)
    return _replay(trace, chosen, capacity, model)


def _replay(trace: Trace, policy: Policy[str], capacity: int, model: Model) -> Outcome:
    hits = hit_tokens = evictions = refused = 0
    saved = 0.0
    for number, request in enumerate(trace):
        if isinstance(policy, Farthest):
            policy.now = number
        asked = dict(request)
        served = [id for id in asked if id in policy]
        missing = [id for id in asked if id not in policy]
        for id in served:
            policy.hit(id)
            hits, hit_tokens = hits + 1, hit_tokens + asked[id]
            saved += model.flops(asked[id])
        for id in missing:
            size = model.size(asked[id])
            victims = policy.victims(policy.bytes + size - capacity, spared=asked)
            if victims is None:
                refused += 1
                continue
            for victim in victims:
                policy.evict(victim)
            evictions += len(victims)
            policy.add(id, size, model.flops(asked[id]))
    return replace(
        _asked(trace, policy.name, capacity, model),
        hits=hits,
        hit_tokens=hit_tokens,
        saved_flops=saved,
        evictions=evictions,
        refused=refused,
    )


def bound(trace: Trace, capacity: int, model: Model) -> Outcome:
    """More hits, tokens or FLOPs than these no policy serves, whatever the sizes.

    PFOO-U of Berger et al., arXiv:1711.03709: to serve a chunk again, its bytes must be there from
    the request before until this one. The store has its capacity times the length of the trace of
    such room, which is given to what is worth most per room, no matter when. Hits, tokens and
    FLOPs are bounded one by one: no policy need reach all three.
    """
    again: list[tuple[float, int, float]] = []  # room in bytes times requests, tokens, FLOPs
    before: dict[str, int] = {}
    for number, request in enumerate(trace):
        for id, tokens in dict(request).items():
            if id in before and (size := model.size(tokens)) <= capacity:
                again.append((size * (number - before[id]), tokens, model.flops(tokens)))
            before[id] = number
    room = capacity * (len(trace) - 1)
    return replace(
        _asked(trace, "bound", capacity, model),
        hits=_fill(room, [(need, 1) for need, _, _ in again]),
        hit_tokens=_fill(room, [(need, tokens) for need, tokens, _ in again]),
        saved_flops=_fill(room, [(need, flops) for need, _, flops in again]),
    )


def _fill(room: float, offers: Iterable[tuple[float, float]]) -> float:
    """The most worth that ``room`` takes of ``offers`` (room, worth); one of them in part."""
    total = 0.0
    for need, worth in sorted(offers, key=lambda offer: offer[0] / offer[1]):
        if need > room:
            return total + worth * room / need
        total, room = total + worth, room - need
    return total


def _asked(trace: Trace, name: str, capacity: int, model: Model) -> Outcome:
    tokens = [count for request in trace for count in dict(request).values()]
    flops = sum(map(model.flops, tokens))
    return Outcome(name, capacity, len(trace), len(tokens), sum(tokens), flops)


def report(
    trace: Trace, model: Model, capacities: Iterable[int], policies: Sequence[str] = tuple(POLICIES)
) -> list[Row]:
    """By capacity: a row for each of ``policies``, then ``belady`` and ``bound``."""
    rows = []
    for capacity in capacities:
        names = (*policies, "belady", "bound")
        outcomes = [simulate(trace, name, capacity, model) for name in names]
        best = outcomes[-2].saved_flops
        rows += [Row(o, o.saved_flops / best if best else math.nan) for o in outcomes]
    return rows


def working_set(trace: Trace, model: Model) -> int:
    """Bytes of the chunks that are asked for more than once: with these, no store could do more."""
    seen: set[str] = set()
    again: dict[str, int] = {}
    for request in trace:
        asked = dict(request)
        again.update((id, tokens) for id, tokens in asked.items() if id in seen)
        seen |= asked.keys()
    return sum(map(model.size, again.values()))
