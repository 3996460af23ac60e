"""What is stored, what became of it, and how fast the machine under it is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from ragcache.show import ms, size

if TYPE_CHECKING:
    from ragcache.doctor import Finding
    from ragcache.speeds import Speeds
    from ragcache.store.catalog import Entry
    from ragcache.store.disk import DiskStore
    from ragcache.store.transfer import Moved


def document_table(entries: Sequence[Entry]) -> Table:
    """Documents, how many chunks each has, and how long it is kept."""
    table = Table("document", Column("chunks", justify="right"), "kept until", "pinned", box=SIMPLE)
    for entry in entries:
        until = "" if entry.expires is None else f"{datetime.fromtimestamp(entry.expires):%F %T}"
        table.add_row(entry.id, str(entry.chunks), until, "yes" if entry.pinned else "")
    return table


def store_table(store: DiskStore) -> Table:
    """What a store holds, for whom, and what its remote is still to be told."""
    stats, waiting = store.stats(), store.waiting
    table = Table("built for", Column("chunks", justify="right"), box=SIMPLE)
    for name, count in sorted(stats.fingerprints.items()):
        table.add_row(name, f"{count:,}")
    table.title = f"{stats.chunks:,} chunks, {size(stats.payload_bytes)} of KV"
    if waiting:
        table.caption = f"{waiting:,} changes are still to be told to the remote"
    return table


def moved(done: Moved, what: str) -> str:
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
        "any prefill": ms(speeds.start_s),
        "a computed token": f"{1e6 * speeds.row_s:.1f} µs",
        "in a prompt of 1,000 tokens, also": f"{1e9 * speeds.pair_s:.1f} µs",
        "a loaded token, to place it": f"{1e6 * speeds.place_s:.1f} µs",
        "a layer of a chunk, to read it": f"{1e6 * speeds.read_s:.1f} µs",
        "and its bytes": rate,
        "of reading, computing stands still for": f"{speeds.stolen:.0%}",
        "a token of the answer": ms(speeds.token_s),
    }
    for codec, seconds in speeds.decode_s.items():
        rows[f"to decode {codec}"] = f"{1e-6 / seconds:,.0f} MB/s" if seconds else "nothing"
    table = Table("what", Column("takes", justify="right"), title=speeds.measured, box=SIMPLE)
    for what, takes in rows.items():
        table.add_row(what, takes)
    return table
