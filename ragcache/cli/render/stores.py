"""What is stored, what became of it, and how fast the machine under it is."""

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
    from ragcache.store.base import StoreStats
    from ragcache.store.catalog.catalog import Entry
    from ragcache.store.remote.sync import Moved
    from ragcache.types import Fingerprint


def document_table(entries: Sequence[Entry]) -> Table:
    """Documents, how many chunks each has, and how long it is kept."""
    heads = Column("document", overflow="fold"), Column("chunks", justify="right")
    table = Table(*heads, "kept until", "pinned", box=SIMPLE)
    for entry in entries:
        until = "" if entry.expires is None else f"{datetime.fromtimestamp(entry.expires):%F %T}"
        table.add_row(one_line(entry.id), str(entry.chunks), until, "yes" if entry.pinned else "")
    return table


def store_table(
    stats: StoreStats, documents: int, waiting: int = 0, own: Fingerprint | None = None
) -> Table:
    """What a store holds, for whom, ``own`` marked, and what its remote is still to be told."""
    numbers = Column("chunks", justify="right"), Column("of KV", justify="right")
    table = Table("built for", *numbers, "", box=SIMPLE)
    mine = "" if own is None else str(own).rpartition("@")[2]
    for name, count in sorted(stats.fingerprints.items()):
        mark = "this model" if name.rpartition("@")[2] == mine else ""
        table.add_row(name, f"{count:,}", size(stats.fingerprint_bytes.get(name, 0)), mark)
    held = f"{stats.chunks:,} chunks, {size(stats.payload_bytes)} of KV"
    table.title = f"{documents:,} documents; {held}"
    if waiting:
        table.caption = f"{waiting:,} changes are still to be told to the remote"
    return table


def built_for(stats: StoreStats) -> dict[str, dict[str, int]]:
    """Chunks and payload bytes by printable fingerprint, for JSON."""
    return {
        name: {"chunks": count, "payload_bytes": stats.fingerprint_bytes.get(name, 0)}
        for name, count in stats.fingerprints.items()
    }


def transfer_text(done: Moved, what: str) -> str:
    """One line: what became of chunks that were to be moved."""
    parts = {
        f"chunks {what}": done.moved,
        "were there": done.there,
        "damaged": done.damaged,
        "foreign (see the log)": done.foreign,
        "had no room": done.no_room,
        "of another kind": done.other,
    }
    return ", ".join(f"{n:,} {part}" for part, n in parts.items() if n or part == f"chunks {what}")


def finding_table(findings: Sequence[Finding]) -> Table:
    """What was looked at, and what to do about it."""
    colours = {"good": "green", "look": "yellow", "bad": "bold red"}
    table = Table("what", "", "found", box=SIMPLE)
    for finding in findings:
        state = Text(finding.state, colours[finding.state])
        table.add_row(finding.what, state, finding.detail)
    return table


def speed_table(speeds: Speeds) -> Table:
    """What was measured, in units for people."""
    rate = f"{1e-9 / speeds.byte_s:.2f} GB/s" if speeds.byte_s else "too fast to tell"
    rows = {
        "any prefill": duration(speeds.start_s),
        "a computed token": duration(speeds.row_s),
        "more for each 1,000 tokens of its prompt": duration(1e3 * speeds.pair_s),
        "a loaded token, to place it": duration(speeds.place_s),
        "a layer of a chunk, to read it": duration(speeds.read_s),
        "more for its bytes": rate,
        "computing loses, of the time of reading": f"{speeds.stolen:.0%}",
        "a token of the answer": duration(speeds.token_s),
    }
    for codec, seconds in speeds.decode_s.items():
        rows[f"to decode {codec}"] = f"{1e-6 / seconds:,.0f} MB/s" if seconds else "nothing"
    title = f"speeds, measured {speeds.measured}"
    table = Table("what", Column("takes", justify="right"), title=title, box=SIMPLE)
    for what, takes in rows.items():
        table.add_row(what, takes)
    return table
