"""Routing of requests to replicas: ``python -m bench.routing``.

The share of the chunks' tokens that is in RAM at the replica of their request, and the requests of
the busiest replica relative to the mean, for 20,000 requests for eight chunks each. A replica's RAM
has room for 2 % of all chunks. *zipf*: chunks are drawn one by one from 8,000, the n-th 1 / n as
often as the first. *topics*: eight of the 16 chunks of one document, of 500 documents whose
popularity follows the same law. Policies are those of `ragcache.sim.routing`: round robin; to the
home of most of a request's tokens; the same, but not to replicas that have received 10 % more than
the mean. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import results
from ragcache.sim.routing import POLICIES, simulate_routing
from ragcache.sim.trace import topic_trace, zipf_trace

SHARE = 0.02  # share of all chunks that fits in the RAM of a replica
REPLICAS = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True)
class Row:
    """A policy over replicas."""

    trace: str
    replicas: int
    hits: dict[str, float]  # policy -> share of the tokens
    imbalance: dict[str, float]  # policy -> requests of the busiest over the mean


def measure(requests: int = 20_000) -> list[Row]:
    traces = {
        "zipf": zipf_trace(requests, 8000, tokens=(256, 256)),
        "topics": topic_trace(requests, 500),
    }
    capacity = int(SHARE * 8000 * 256)
    rows = []
    for name, trace in traces.items():
        for replicas in REPLICAS:
            routed = {
                policy: simulate_routing(trace, policy, replicas, capacity) for policy in POLICIES
            }
            hits = {policy: one.hit_rate for policy, one in routed.items()}
            rows.append(
                Row(name, replicas, hits, {policy: one.imbalance for policy, one in routed.items()})
            )
    return rows


def table(found: Sequence[Row]) -> str:
    heads = ["trace", "replicas", *POLICIES, *(f"busiest, {policy}" for policy in POLICIES[1:])]
    rows = [
        [
            one.trace,
            str(one.replicas),
            *(f"{100 * one.hits[policy]:.0f} %" for policy in POLICIES),
            *(f"{one.imbalance[policy]:.2f}" for policy in POLICIES[1:]),
        ]
        for one in found
    ]
    return results.table(heads, rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("routing", found, table(found), out)


if __name__ == "__main__":
    main()
