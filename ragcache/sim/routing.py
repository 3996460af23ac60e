"""Which of several replicas a request goes to, and what that does to their tiers in RAM.

Every replica has all chunks on its disk, or within reach, and some of them in RAM. Requests that go
anywhere make all replicas hold the same popular chunks; requests that go where their chunks are at
home make them hold different ones, and a popular chunk's home more than its share of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from ragcache.errors import ConfigError
from ragcache.sim.lru import LruSet
from ragcache.sim.trace import Trace, TraceRequest

POLICIES = "turns", "affine", "bounded"
LOAD_SLACK = 0.1  # above the mean, that a replica of policy bounded takes


@dataclass(frozen=True, slots=True)
class RoutingOutcome:
    """What became of a trace."""

    policy: str
    replicas: int
    tokens: int  # of the chunks that were asked for
    hit_tokens: int  # of these, of chunks that were in RAM where they were asked for
    requests: tuple[int, ...]  # that each replica got
    loaded: tuple[int, ...]  # tokens that each replica had to load

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / max(1, self.tokens)

    @property
    def imbalance(self) -> float:
        """Requests of the replica that got most, over the mean: 1 is even."""
        return max(self.requests) * self.replicas / max(1, sum(self.requests))


def simulate_routing(trace: Trace, policy: str, replicas: int, capacity: int) -> RoutingOutcome:
    """Send every request of ``trace`` to one of ``replicas``, each with ``capacity`` tokens in RAM.

    - ``turns``: each in its turn.
    - ``affine``: to the home of most of its tokens; a chunk's home follows from its document, which
      is its id before ``#`` (rendezvous hashing: one replica more moves a part 1 / replicas).
    - ``bounded``: the same, but to the next best where that one has had SLACK more than the mean
      (consistent hashing with bounded loads, Mirrokni et al., arXiv:1608.01350).

    Raises ConfigError for another policy, or less than 1 replica.
    """
    if policy not in POLICIES or replicas < 1:
        raise ConfigError(
            f"cannot route by {policy!r} over {replicas} replicas: use {', '.join(POLICIES)}, and "
            "at least 1 replica"
        )
    sizes = {asked.id: asked.tokens for request in trace for asked in request}
    home = {id: _home(id, replicas) for id in sizes}
    tiers = [LruSet(sizes, capacity) for _ in range(replicas)]
    counts, loaded, hits, total = [0] * replicas, [0] * replicas, 0, 0
    for number, request in enumerate(trace):
        wanted = dict(request)
        at = _choose(policy, request, number, home, counts)
        missing = sum(tokens for id, tokens in wanted.items() if id not in tiers[at])
        tiers[at].use(wanted)
        counts[at] += 1
        loaded[at] += missing
        total += sum(wanted.values())
        hits += sum(wanted.values()) - missing
    return RoutingOutcome(policy, replicas, total, hits, tuple(counts), tuple(loaded))


def _choose(
    policy: str, request: TraceRequest, number: int, home: dict[str, int], counts: Sequence[int]
) -> int:
    replicas = len(counts)
    if policy == "turns":
        return number % replicas
    tokens = [0] * replicas
    for id, count in dict(request).items():
        tokens[home[id]] += count
    ranked = sorted(range(replicas), key=lambda at: (-tokens[at], counts[at]))
    if policy == "affine":
        return ranked[0]
    most = (1 + LOAD_SLACK) * (number + 1) / replicas
    return next((at for at in ranked if counts[at] + 1 <= max(1, most)), ranked[-1])


def _home(id: str, replicas: int) -> int:
    document = (id.rpartition("#")[0] or id).encode()
    return max(range(replicas), key=lambda at: xxh3_64_intdigest(document, seed=at))
