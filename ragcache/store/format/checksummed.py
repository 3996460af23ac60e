"""Records with a checksum over their body, table and key."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from ragcache.errors import StoreError

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Tables, Transaction

CHECKSUMMED_TABLES = "variants", "documents", "chunks", "vectors"
_CHECKSUM = struct.Struct("<Q")


def put_checksummed(txn: Transaction, table: str, key: bytes, body: bytes) -> None:
    """Put a record, replacing the one under ``key``."""
    txn.put(table, key, _CHECKSUM.pack(_checksum(table, key, body)) + body)


def get_checksummed(txn: Transaction, table: str, key: bytes) -> bytes:
    """The body of a record. Raises KeyError where there is none, StoreError if it is damaged."""
    record = txn.get(table, key)
    name = int.from_bytes(key, "big") if len(key) == 8 else key.hex()[:12]
    if record is None:
        raise KeyError(f"no row {name} in {table}: its document was replaced or deleted")
    body = record[_CHECKSUM.size :]
    if record[: _CHECKSUM.size] != _CHECKSUM.pack(_checksum(table, key, body)):
        raise StoreError(
            f"row {name} in {table} is damaged: index its document again", reason="corrupt"
        )
    return body


def damaged_rows(tables: Tables) -> dict[str, str]:
    """Read all checksummed records of a store: table and key -> what is wrong with it."""
    bad = {}
    with tables.read() as txn:
        for table in CHECKSUMMED_TABLES:
            for key in txn.keys(table):
                try:
                    get_checksummed(txn, table, key)
                except (KeyError, StoreError) as error:
                    bad[f"{table} {key.hex()}"] = str(error)
    return bad


def json_bytes(value: object) -> bytes:
    """JSON that keeps lone surrogates, which stand for invalid UTF-8 in file names."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # as json.loads decodes


def _checksum(table: str, key: bytes, body: bytes) -> int:
    return xxh3_64_intdigest(body, seed=xxh3_64_intdigest(table.encode() + b"\0" + key))
