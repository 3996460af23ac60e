"""Savings of a store that is smaller than its working set, by eviction policy.

``python -m bench.evict`` prints the table: a Zipf trace, the same with scans (batch jobs that touch
cold chunks once), and one whose popular chunks change half-way. Sizes and costs are an 8B Llama's.
"""

from __future__ import annotations

from ragcache.planning.flops import ModelShape
from ragcache.sim.eviction import PolicyComparison, compare_policies, working_set_bytes
from ragcache.sim.trace import SYNTHETIC_TRACES, Trace, TraceChunk, zipf_trace
from ragcache.types import KVSpec

MODEL = ModelShape(KVSpec(32, 8, 128, "bfloat16"), parameters=8_030_000_000, heads=32)
SHARES = (0.05, 0.10, 0.25)


def traces() -> dict[str, Trace]:
    popular = SYNTHETIC_TRACES["zipf"]()
    moved = [
        tuple(TraceChunk(f"new {id}", n) for id, n in request) for request in zipf_trace(1500, 2000)
    ]
    return {
        "Zipf": popular,
        "Zipf and scans": SYNTHETIC_TRACES["scans"](),
        "Zipf, moved": [*popular[:1500], *moved],
    }


def line(name: str, share: float, row: PolicyComparison) -> str:
    o = row.outcome
    rates = " | ".join(f"{100 * rate:.1f}" for rate in (o.hit_rate, o.token_rate, o.saved))
    evicted = "" if o.policy == "bound" else o.evictions
    return f"| {name} | {share:.0%} | {o.policy} | {rates} | {row.of_belady:.0%} | {evicted} |"


def main() -> None:
    print("| trace | store | policy | chunks % | tokens % | FLOPs % | of Belady's | evictions |")
    print("|---|--:|---|--:|--:|--:|--:|--:|")
    for name, trace in traces().items():
        whole = working_set_bytes(trace, MODEL)
        capacities = {int(share * whole): share for share in SHARES}
        for row in compare_policies(trace, MODEL, capacities):
            print(line(name, capacities[row.outcome.capacity], row))


if __name__ == "__main__":
    main()
