"""A checksummed record is complete and under its own key; otherwise the error names the row."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ragcache.errors import StoreError
from ragcache.store.format.checksummed import (
    CHECKSUMMED_TABLES,
    damaged_rows,
    get_checksummed,
    put_checksummed,
)
from ragcache.store.lmdb.tables import MemoryTables, Transaction

ROW = (7).to_bytes(8, "big")
NAME = bytes(range(32))


def moved(txn: Transaction) -> None:
    txn.put("documents", ROW, txn.get("chunks", ROW) or b"")


def renamed(txn: Transaction) -> None:
    txn.put("chunks", NAME, txn.get("chunks", ROW) or b"")


def flipped(txn: Transaction) -> None:
    raw = bytearray(txn.get("chunks", ROW) or b"")
    raw[-1] ^= 1
    txn.put("chunks", ROW, bytes(raw))


@pytest.mark.parametrize(
    ("damage", "table", "key", "row"),
    [
        (moved, "documents", ROW, "row 7 in documents"),
        (renamed, "chunks", NAME, f"row {NAME.hex()[:12]} in chunks"),
        (flipped, "chunks", ROW, "row 7 in chunks"),
    ],
)
def test_what_is_not_as_it_was_put_is_corrupt(
    damage: Callable[[Transaction], None], table: str, key: bytes, row: str
) -> None:
    tables = MemoryTables()
    with tables.write() as txn:
        put_checksummed(txn, "chunks", ROW, b"a body")
        assert bytes(get_checksummed(txn, "chunks", ROW)) == b"a body"
        damage(txn)
        with pytest.raises(StoreError, match=f"^{row} is damaged: index its document") as caught:
            get_checksummed(txn, table, key)
    assert caught.value.reason == "corrupt"


def test_every_sealed_row_is_looked_at() -> None:
    tables = MemoryTables()
    with tables.write() as txn:
        for table in CHECKSUMMED_TABLES:
            put_checksummed(txn, table, ROW, b"a body")
        flipped(txn)
    assert damaged_rows(tables) == {
        f"chunks {ROW.hex()}": "row 7 in chunks is damaged: index its document again"
    }
