"""Render plans, results and estimates for corpora as text, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Column, Table

from ragcache.cli.render import decimal, duration, size

if TYPE_CHECKING:
    from ragcache.batch.plan import PrecomputePlan, WorkSize
    from ragcache.batch.run import RunProgress
    from ragcache.sim.eviction import PolicyComparison
    from ragcache.sim.routing import RoutingOutcome
    from ragcache.sim.sizing import CorpusEstimate


def plan_text(work: PrecomputePlan, rate: float | None) -> str:
    """Numbers of stored and missing chunks, and the time at ``rate`` tokens per second."""
    missing = work.missing
    part = "" if work.shard.of == 1 else f", shard {work.shard}"
    text = (
        f"{work.documents} documents{part}: {work.wanted.chunks} chunks of {work.wanted.tokens} "
        f"tokens, {work.stored.chunks} of them are there; {missing.chunks} to compute: "
        f"{missing.tokens} tokens, {size(missing.payload_bytes)}, {missing.flops:.3g} FLOPs"
    )
    return text + (f", about {duration(missing.tokens / rate)}" if rate else "")


def result_text(done: RunProgress, state: str) -> str:
    """What a run has computed, and how much is left."""
    one, left = done.computed, (done.planned - done.computed).chunks
    rate = f", {one.tokens / done.seconds:.0f} tokens/s" if one.tokens else ""
    text = (
        f"KV of {one.chunks} chunks computed ({one.tokens} tokens, "
        f"{size(one.payload_bytes)}) in {duration(done.seconds)}{rate}"
    )
    return text if state == "done" else f"{text}; {left} are left: run it again ({state})"


def precompute_json(
    work: PrecomputePlan, rate: float | None, done: RunProgress, state: str, skipped: Sequence[str]
) -> dict[str, Any]:
    """Plan and result of `ragcache precompute`, for JSON."""
    sizes: dict[str, WorkSize] = {
        "wanted": work.wanted,
        "stored": work.stored,
        "missing": work.missing,
        "computed": done.computed,
    }
    return {
        "state": state,
        "documents": work.documents,
        "shard": str(work.shard),
        **{name: asdict(one) for name, one in sizes.items()},
        "expected_s": work.missing.tokens / rate if rate else None,
        "seconds": done.seconds,
        "skipped": list(skipped),
    }


def sizing_text(one: CorpusEstimate, model: str, codec: str, tokens: int, ratio: float) -> str:
    """Bytes and times of one chunk, and from how many uses on storing its KV pays off."""
    from ragcache.sim.sizing import break_even_bandwidth  # torch comes with it

    each = decimal(one.bytes / one.chunks / tokens)
    return (
        f"{model}, {codec}: {each} per token. A chunk of {tokens} tokens is loaded in "
        f"{duration(one.load_s)} over the link, or computed in {duration(one.prefill_s)}; "
        f"loading is at least as fast as computing what it saves from "
        f"{decimal(break_even_bandwidth(one, ratio))}/s on. Its KV pays off from {one.reuses:.1f} "
        f"uses per month on, {one.first_reuses:.1f} in the first month."
    )


def sizing_table(rows: Sequence[CorpusEstimate]) -> Table:
    """Bytes, prices and times of corpora of several sizes."""
    heads = "chunks", "bytes", "a month", "GPU time", "GPU price", "over the link"
    table = Table(*(Column(head, justify="right") for head in heads), box=SIMPLE)
    for row in rows:
        table.add_row(
            f"{row.chunks:,}",
            decimal(row.bytes),
            f"{row.month:,.2f}",
            duration(row.gpu_s),
            f"{row.gpu:,.2f}",
            duration(row.copy_s),
        )
    return table


def routing_table(rows: Sequence[RoutingOutcome]) -> Table:
    """Share of tokens that replicas serve from RAM, and how evenly they are loaded."""
    heads = "replicas", "policy", "served from RAM", "most requests / mean", "most loaded / mean"
    table = Table(*(Column(head, justify="right") for head in heads), box=SIMPLE)
    for row in rows:
        most = max(row.loaded) * row.replicas / max(1, sum(row.loaded))
        rates = f"{100 * row.hit_rate:.1f} %", f"{row.imbalance:.2f}", f"{most:.2f}"
        table.add_row(str(row.replicas), row.policy, *rates)
    return table


def simulation_table(rows: Sequence[PolicyComparison], working_set: int) -> Table:
    """Hit rates of each eviction policy, in percent. ``working_set``: bytes of chunks that are
    requested at least twice."""
    table = Table(
        "store",
        "policy",
        *(Column(head, justify="right") for head in ("chunks", "tokens", "FLOPs", "of Belady's")),
        Column("evictions", justify="right"),
        title=f"hits in percent; requested at least twice: {size(working_set)}",
        box=SIMPLE,
    )
    for row in rows:
        o = row.outcome
        rates = (f"{100 * rate:.1f}" for rate in (o.hit_rate, o.token_rate, o.saved, row.of_belady))
        evictions = "" if o.policy == "bound" else str(o.evictions)
        table.add_row(size(o.capacity), o.policy, *rates, evictions, end_section=not evictions)
    return table


def simulation_json(row: PolicyComparison) -> dict[str, Any]:
    """Result of a policy on a trace, for JSON; rates are in [0, 1]."""
    o = row.outcome
    rates = {"chunk_rate": o.hit_rate, "token_rate": o.token_rate, "saved_flops_rate": o.saved}
    return {**asdict(o), **rates, "of_belady": row.of_belady}


def routing_json(routed: RoutingOutcome) -> dict[str, Any]:
    """Result of routing a trace over replicas, for JSON."""
    return {**asdict(routed), "token_rate": routed.hit_rate, "imbalance": routed.imbalance}
