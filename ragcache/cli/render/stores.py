"""Render stores, transfers, findings of `ragcache doctor`, and measured speeds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from ragcache.cli.render import duration, one_line, size

if TYPE_CHECKING:
    from ragcache.cli.doctor import Finding
    from ragcache.planning.cost_model import Speeds
    from ragcache.retriever.index_description import IndexDescription
    from ragcache.store.base import StoreStats
    from ragcache.store.catalog.catalog import DocumentEntry
    from ragcache.store.remote.sync import SyncResult
    from ragcache.types import Fingerprint


def document_table(entries: Sequence[DocumentEntry]) -> Table:
    """Documents with their number of chunks, expiry and pin."""
    heads = Column("document", overflow="fold"), Column("chunks", justify="right")
    table = Table(*heads, "kept until", "pinned", box=SIMPLE)
    for entry in entries:
        until = "" if entry.expires is None else f"{datetime.fromtimestamp(entry.expires):%F %T}"
        table.add_row(one_line(entry.id), str(entry.chunks), until, "yes" if entry.pinned else "")
    return table


def store_table(
    stats: StoreStats, documents: int, waiting: int = 0, own: Fingerprint | None = None
) -> Table:
    """Chunks and bytes by the model that they were computed with; ``own`` is marked. ``waiting``:
    number of pending remote writes."""
    numbers = Column("chunks", justify="right"), Column("of KV", justify="right")
    table = Table("built for", *numbers, "", box=SIMPLE)
    mine = "" if own is None else str(own).rpartition("@")[2]
    for name, count in sorted(stats.fingerprints.items()):
        mark = "this model" if name.rpartition("@")[2] == mine else ""
        table.add_row(name, f"{count:,}", size(stats.fingerprint_bytes.get(name, 0)), mark)
    held = f"{stats.chunks:,} chunks, {size(stats.payload_bytes)} of KV"
    table.title = f"{documents:,} documents; {held}"
    if waiting:
        table.caption = f"{waiting:,} pending remote writes"
    return table


def index_text(index: IndexDescription) -> str:
    """One line about the vector index."""
    told = f"index: {index.kind} of {index.vectors:,} vectors, "
    if index.measured is None:
        return told + "exact"
    when = f"{datetime.fromtimestamp(index.measured):%F %T}"
    told += f"recall@10 {index.recall:.1%}, measured {when}, width {index.width}"
    return told + f" (below index_recall, {index.floor:.1%})" if index.is_below_floor else told


def built_for(stats: StoreStats) -> dict[str, dict[str, int]]:
    """Numbers of chunks and payload bytes by printable fingerprint, for JSON."""
    return {
        name: {"chunks": count, "payload_bytes": stats.fingerprint_bytes.get(name, 0)}
        for name, count in stats.fingerprints.items()
    }


def transfer_text(done: SyncResult, what: str) -> str:
    """One line with the numbers of chunks that were transferred or not, by reason."""
    parts = {
        f"chunks {what}": done.moved,
        "were there already": done.there,
        "damaged": done.damaged,
        "foreign (see the log)": done.foreign,
        "had no room": done.no_room,
        "of another kind": done.other,
    }
    return ", ".join(f"{n:,} {part}" for part, n in parts.items() if n or part == f"chunks {what}")


def finding_table(findings: Sequence[Finding]) -> Table:
    """What was checked, its state, and what to do about it."""
    colours = {"good": "green", "look": "yellow", "bad": "bold red"}
    table = Table("what", "", "found", box=SIMPLE)
    for finding in findings:
        state = Text(finding.state, colours[finding.state])
        table.add_row(finding.what, state, finding.detail)
    return table


def speed_table(speeds: Speeds) -> Table:
    """Measured speeds as times and rates."""
    rate = f"{1e-9 / speeds.byte_s:.2f} GB/s" if speeds.byte_s else "too fast to measure"
    rows = {
        "start of a prefill": duration(speeds.start_s),
        "computing a token": duration(speeds.row_s),
        "additionally, per 1,000 tokens of its prompt": duration(1e3 * speeds.pair_s),
        "placing a loaded token": duration(speeds.place_s),
        "reading a layer of a chunk": duration(speeds.read_s),
        "bandwidth of reading": rate,
        "computing loses, of the time of reading": f"{speeds.overlap_penalty:.0%}",
        "decoding a token of the answer": duration(speeds.token_s),
    }
    for codec, seconds in speeds.decode_s.items():
        rows[f"decompressing {codec}"] = f"{1e-6 / seconds:,.0f} MB/s" if seconds else "nothing"
    title = f"speeds, measured {speeds.measured}"
    table = Table("what", Column("takes", justify="right"), title=title, box=SIMPLE)
    for what, takes in rows.items():
        table.add_row(what, takes)
    return table
