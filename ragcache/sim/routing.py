"""Simulate routing of requests to replicas, and its effect on their RAM tiers.

Every replica can read all chunks from disk or a remote, and has some of them in RAM. If requests go
to any replica, all replicas have the same popular chunks in RAM. If requests go to the replica that
their chunks hash to, replicas have different chunks in RAM, but popular chunks overload theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragcache.errors import ConfigError
from ragcache.sim.lru import LruSet
from ragcache.sim.trace import Trace, TraceRequest
from ragcache.util.rendezvous import home

__all__ = ["POLICIES", "RoutingOutcome", "simulate_routing"]

POLICIES = "turns", "affine", "bounded"
LOAD_SLACK = 0.1  # load above the mean that the policy ``bounded`` allows


@dataclass(frozen=True, slots=True)
class RoutingOutcome:
    """The result of one routing policy on a trace."""

    policy: str
    replicas: int
    tokens: int  # of the requested chunks
    hit_tokens: int  # of these, tokens of chunks in the RAM of their replica
    requests: tuple[int, ...]  # by replica
    loaded: tuple[int, ...]  # tokens that were not in RAM, by replica

    @property
    def hit_rate(self) -> float:
        """Share of the requested tokens that were in RAM."""
        return self.hit_tokens / max(1, self.tokens)

    @property
    def imbalance(self) -> float:
        """Requests of the busiest replica over the mean; 1 is an even distribution."""
        return max(self.requests) * self.replicas / max(1, sum(self.requests))


def simulate_routing(trace: Trace, policy: str, replicas: int, capacity: int) -> RoutingOutcome:
    """Route ``trace`` over ``replicas`` that each have ``capacity`` tokens of RAM.

    - ``turns``: round robin.
    - ``affine``: to the home of most of its tokens. A chunk's home follows from its document (id
      before ``#``) by rendezvous hashing, so that one more replica takes over a share of them.
    - ``bounded``: as ``affine``, but to the next best replica if the load of the best one exceeds
      the mean by :data:`LOAD_SLACK` (consistent hashing with bounded loads, Mirrokni et al.,
      arXiv:1608.01350).

    Raises ConfigError for other policies, and for less than 1 replica.
    """
    if policy not in POLICIES or replicas < 1:
        raise ConfigError(
            f"cannot route by {policy!r} over {replicas} replicas: use {', '.join(POLICIES)}, and "
            "at least 1 replica"
        )
    sizes = {chunk.id: chunk.tokens for request in trace for chunk in request}
    names = [str(number) for number in range(replicas)]
    homes = {id: int(home((id.rpartition("#")[0] or id).encode(), names)) for id in sizes}
    tiers = [LruSet(sizes, capacity) for _ in range(replicas)]
    counts, loaded, hits, total = [0] * replicas, [0] * replicas, 0, 0
    for number, request in enumerate(trace):
        requested = dict(request)
        at = _choose(policy, request, number, homes, counts)
        missing = sum(tokens for id, tokens in requested.items() if id not in tiers[at])
        tiers[at].use(requested)
        counts[at] += 1
        loaded[at] += missing
        total += sum(requested.values())
        hits += sum(requested.values()) - missing
    return RoutingOutcome(policy, replicas, total, hits, tuple(counts), tuple(loaded))


def _choose(
    policy: str, request: TraceRequest, number: int, homes: dict[str, int], counts: Sequence[int]
) -> int:
    replicas = len(counts)
    if policy == "turns":
        return number % replicas
    tokens = [0] * replicas
    for id, count in dict(request).items():
        tokens[homes[id]] += count
    ranked = sorted(range(replicas), key=lambda at: (-tokens[at], counts[at]))
    if policy == "affine":
        return ranked[0]
    most = (1 + LOAD_SLACK) * (number + 1) / replicas
    return next((at for at in ranked if counts[at] + 1 <= max(1, most)), ranked[-1])
