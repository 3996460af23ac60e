"""Named tables of bytes with transactions, on which the KV store and the catalog are built.

One directory holds both, so that one commit can change both. :class:`MemoryTables` is the
reference; :class:`ragcache.store.lmdb.environment.Environment` is the one on disk.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from ragcache.errors import StoreError

#: All tables: key -> value. Digests are 32 bytes, numbers in keys big-endian.
TABLES = {
    "meta": "b'format' -> magic, format version of the whole store",
    "headers": "key digest -> header record (see header)",
    "layers": "key digest, layer u16 -> the layer's bytes, unless they are in a file (see header)",
    "contents": "content digest, key digest -> nothing: which keys hold the same tokens",
    "variants": "key digest -> checksummed JSON: score and notes of a variant",
    "usage": "key digest -> Usage, four float64 (see eviction): where there is a quota",
    "totals": "fingerprint digest -> chunks u64, payload bytes u64, printable fingerprint",
    "documents": "blake3(document id) -> checksummed JSON",
    "uses": "content digest, row u64 -> nothing: which indexed chunks have this content",
    "pins": "the same, of documents whose KV is not to be evicted",
    "used": "row u64 -> content digests: what to delete from uses and pins with the row",
    "chunks": "row u64 -> checksummed JSON",
    "vectors": "row u64 -> checksummed float32",
    "counters": "name -> u64",
    "settings": "name -> text",
    "promises": "blake3(document id), number u64 -> nothing: pending documents (see promises)",
    "texts": "name -> temporary text of any length, such as a job's documents",
    "outbox": "content digest, key digest or none -> a pending write to a remote (see outbox)",
}


class Transaction(ABC):
    """Reads see one state of all tables, plus what this transaction wrote.

    Rows come in byte order of their keys. Do not write to a table while iterating over it.
    """

    @abstractmethod
    def view(self, table: str, key: bytes) -> memoryview | bytes | None:
        """The value, without a copy where possible.

        It is only valid until the next write or the end of this transaction.
        """

    def get(self, table: str, key: bytes) -> bytes | None:
        """A copy of the value; None where there is no such row."""
        value = self.view(table, key)
        return None if value is None else bytes(value)

    @abstractmethod
    def put(self, table: str, key: bytes, value: bytes | memoryview) -> None: ...

    @abstractmethod
    def delete(self, table: str, key: bytes) -> bool:
        """True if there was such a row."""

    @abstractmethod
    def keys(self, table: str, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[bytes]:
        """Keys that begin with ``prefix``, from ``start`` (inclusive) on."""

    @abstractmethod
    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]: ...

    @abstractmethod
    def count(self, table: str) -> int:
        """The number of rows."""

    @abstractmethod
    def clear(self, table: str) -> None: ...


class Tables(ABC):
    """All of :data:`TABLES`. Thread-safe."""

    @abstractmethod
    def read(self) -> AbstractContextManager[Transaction]:
        """A read transaction, which sees one state. Keep it short: freed space cannot be reused
        while it is open."""

    @abstractmethod
    def write(self) -> AbstractContextManager[Transaction]:
        """A write transaction: commits at the end of the context, durably, or nothing if it raises.

        Waits for other writers. A thread must not nest write transactions.
        """

    def become_writer(self) -> None:
        """Become the only writer. Raises StoreError at once where that is not possible."""
        return

    def refusal(self) -> str | None:
        """Why this process cannot write now; None where it can. Does not wait."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Wait for running transactions, then release all resources. Closing twice is allowed."""


_Rows = dict[bytes, bytes]


class _MemoryTransaction(Transaction):
    def __init__(self, tables: dict[str, _Rows]) -> None:
        self.tables = tables

    def view(self, table: str, key: bytes) -> bytes | None:
        return self.tables[table].get(key)

    def put(self, table: str, key: bytes, value: bytes | memoryview) -> None:
        self.tables[table][key] = bytes(value)

    def delete(self, table: str, key: bytes) -> bool:
        return self.tables[table].pop(key, None) is not None

    def keys(self, table: str, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[bytes]:
        ordered = sorted(self.tables[table])
        for key in ordered[bisect_left(ordered, max(prefix, start)) :]:
            if not key.startswith(prefix):
                return
            yield key

    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted(self.tables[table].items())

    def count(self, table: str) -> int:
        return len(self.tables[table])

    def clear(self, table: str) -> None:
        self.tables[table].clear()


class MemoryTables(Tables):
    """Tables as dicts. A write changes copies and swaps them in, so that readers see one state."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._tables: dict[str, _Rows] = {name: {} for name in TABLES}
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        self._check_open()
        yield _MemoryTransaction(self._tables)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        with self._writing:
            self._check_open()
            changed = {name: rows.copy() for name, rows in self._tables.items()}
            yield _MemoryTransaction(changed)
            self._tables = changed

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed: open it again")


_COUNTER = struct.Struct("<Q")


def get_counter(txn: Transaction, name: str) -> int:
    """The value of a counter, such as the next row; 0 where none was set."""
    record = txn.get("counters", name.encode())
    return int(_COUNTER.unpack(record)[0]) if record else 0


def set_counter(txn: Transaction, name: str, value: int) -> None:
    """Set a counter, to less than 2^64."""
    txn.put("counters", name.encode(), _COUNTER.pack(value))
