"""Numbers by name in a store's tables: the next row, the generation, the dimension of vectors."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_NUMBER = struct.Struct("<Q")


def get_counter(txn: Transaction, name: str) -> int:
    """The counter's value; 0 where none was set."""
    record = txn.get("counters", name.encode())
    return int(_NUMBER.unpack(record)[0]) if record else 0


def set_counter(txn: Transaction, name: str, value: int) -> None:
    txn.put("counters", name.encode(), _NUMBER.pack(value))
