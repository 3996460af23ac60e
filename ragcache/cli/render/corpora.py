"""Work on corpora, and what it takes: as text and tables, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Column, Table

from ragcache.cli.render import decimal, duration, size

if TYPE_CHECKING:
    from ragcache.batch.plan import Size, Work
    from ragcache.batch.run import Done
    from ragcache.sim.eviction import Row
    from ragcache.sim.routing import Routed
    from ragcache.sim.sizing import Sizing


def plan_text(work: Work, rate: float | None) -> str:
    """What is there, what is missing, and how long it takes at ``rate`` tokens a second."""
    missing = work.missing
    part = "" if work.shard.of == 1 else f", shard {work.shard}"
    said = (
        f"{work.documents} documents{part}: {work.wanted.chunks} chunks of {work.wanted.tokens} "
        f"tokens, {work.stored.chunks} of them are there; {missing.chunks} to compute: "
        f"{missing.tokens} tokens, {size(missing.payload_bytes)}, {missing.flops:.3g} FLOPs"
    )
    return said + (f", about {duration(missing.tokens / rate)}" if rate else "")


def result_text(done: Done, state: str) -> str:
    """What a run has done, and whether anything is left."""
    one, left = done.computed, (done.planned - done.computed).chunks
    rate = f", {one.tokens / done.seconds:.0f} tokens/s" if one.tokens else ""
    said = (
        f"KV of {one.chunks} chunks computed ({one.tokens} tokens, "
        f"{size(one.payload_bytes)}) in {duration(done.seconds)}{rate}"
    )
    return said if state == "done" else f"{said}; {left} are left: run it again ({state})"


def precompute_json(
    work: Work, rate: float | None, done: Done, state: str, skipped: Sequence[str]
) -> dict[str, Any]:
    """Plan and outcome of a precompute, for machines."""
    sizes: dict[str, Size] = {
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


def sizing_text(one: Sizing, model: str, codec: str, tokens: int, ratio: float) -> str:
    """What a chunk takes, and when its KV pays."""
    from ragcache.sim.sizing import break_even_link  # torch comes with it

    each = decimal(one.bytes / one.chunks / tokens)
    return (
        f"{model}, {codec}: {each} a token. A chunk of {tokens} is loaded in "
        f"{duration(one.load_s)} over the link, or computed in {duration(one.prefill_s)}; "
        f"loading is no slower than computing what it saves from "
        f"{decimal(break_even_link(one, ratio))}/s on. Its KV pays from {one.reuses:.1f} uses a "
        f"month on, {one.first_reuses:.1f} in the first month."
    )


def sizing_table(rows: Sequence[Sizing]) -> Table:
    """What corpora take."""
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


def routing_table(rows: Sequence[Routed]) -> Table:
    """What replicas that share a trace serve from RAM, and how evenly."""
    heads = "replicas", "policy", "served from RAM", "most requests / mean", "most loaded / mean"
    table = Table(*(Column(head, justify="right") for head in heads), box=SIMPLE)
    for row in rows:
        most = max(row.loaded) * row.replicas / max(1, sum(row.loaded))
        rates = f"{100 * row.hit_rate:.1f} %", f"{row.imbalance:.2f}", f"{most:.2f}"
        table.add_row(str(row.replicas), row.policy, *rates)
    return table


def simulation_table(rows: Sequence[Row], working_set: int) -> Table:
    """What each policy would have served, in percent; ``working_set`` in bytes."""
    table = Table(
        "store",
        "policy",
        *(Column(head, justify="right") for head in ("chunks", "tokens", "FLOPs", "of Belady's")),
        Column("evictions", justify="right"),
        title=f"served of the trace, in percent; asked for twice and more: {size(working_set)}",
        box=SIMPLE,
    )
    for row in rows:
        o = row.outcome
        rates = (f"{100 * rate:.1f}" for rate in (o.hit_rate, o.token_rate, o.saved, row.of_belady))
        evictions = "" if o.policy == "bound" else str(o.evictions)
        table.add_row(size(o.capacity), o.policy, *rates, evictions, end_section=not evictions)
    return table


def simulation_json(row: Row) -> dict[str, Any]:
    """What a policy would have served of a trace; rates are in [0, 1]."""
    o = row.outcome
    rates = {"chunk_rate": o.hit_rate, "token_rate": o.token_rate, "saved_flops_rate": o.saved}
    return {**asdict(o), **rates, "of_belady": row.of_belady}


def routing_json(routed: Routed) -> dict[str, Any]:
    """What replicas would have served of a trace from RAM, and how evenly."""
    return {**asdict(routed), "token_rate": routed.hit_rate, "imbalance": routed.imbalance}
