"""The tables on disk: one LMDB environment, opened with care.

A directory (0700) with ``data.mdb`` and ``lock.mdb`` (LMDB's own) and ``writer.lock`` (which
process may write), all 0600. An existing store keeps the permissions that its owner gave it.
Local file systems only: LMDB maps its file and locks through shared memory.

Settings are LMDB's safe ones: every commit is synced, nothing is written through the map
(``writemap`` turns a stray pointer into damage), the kernel reads ahead (cold reads are 100 times
slower without). The map never grows: it is one huge sparse reservation of address space, not of
disk or memory.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lmdb

from ragcache.errors import StoreError
from ragcache.store.directory import claim, explained, release
from ragcache.store.tables import TABLES, Tables, Transaction

FORMAT = 1
_FORMAT = struct.Struct("<8sI")
_MAGIC = b"ragcache"


class Environment(Tables):
    """:data:`TABLES` in the directory ``path``, which is made where it is missing.

    ``map_size`` (bytes) is the most that the store can ever hold. One writer process at a time;
    any number of processes with ``readonly``. Not usable in a child made by fork.
    """

    def __init__(
        self, path: str | Path, *, map_size: int = 1 << 40, readonly: bool = False
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.readonly = readonly
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._running = 0
        self._closed = False
        self._claim: IO[bytes] | None = None
        with explained(self.path, "open"):
            if readonly and not (self.path / "data.mdb").is_file():
                raise _no_store(self.path)
            self._claim = None if readonly else claim(self.path)
            try:
                self._env = _open(self.path, map_size, readonly)
                self._tables = _tables(self._env, self.path, readonly)
            except BaseException:
                self._release()
                raise

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        with self._entered(), explained(self.path, "read"):
            with self._env.begin(buffers=True) as txn:
                yield _LmdbTransaction(txn, self._tables)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        if self.readonly:
            raise StoreError(f"the store in {self.path} was opened with readonly=True")
        with self._entered(), explained(self.path, "write to"):
            with self._env.begin(write=True, buffers=True) as txn:
                yield _LmdbTransaction(txn, self._tables)
            # LMDB leaves unused pages at the end unwritten; a file that covers all pages lets
            # the next open tell a truncated one.
            needed, size = _extent(self._env, self.path)
            if size < needed:
                os.truncate(self.path / "data.mdb", needed)

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child must leave the parent's environment alone
        with self._idle:
            self._closed = True  # no new ones; then wait, for closing unmaps what they read
            self._idle.wait_for(lambda: self._running == 0)
        self._release()

    def _release(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()
        if self._claim is not None and not self._claim.closed:
            release(self._claim)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the store in {self.path} was opened by process {self._pid} and cannot be used "
                f"in its fork {os.getpid()}: start workers with the spawn method, and open the "
                "store in each"
            )
        with self._idle:
            if self._closed:
                raise StoreError(f"the store in {self.path} is closed: open it again")
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()


class _LmdbTransaction(Transaction):
    def __init__(self, txn: lmdb.Transaction[Any], tables: dict[str, Any]) -> None:
        self.txn = txn
        self.tables = tables

    def view(self, table: str, key: bytes) -> memoryview | None:
        value: memoryview | None = self.txn.get(key, db=self.tables[table])
        return value

    def put(self, table: str, key: bytes, value: bytes | memoryview) -> None:
        self.txn.put(key, value, db=self.tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        return self.txn.delete(key, db=self.tables[table])

    def keys(self, table: str, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[bytes]:
        with self.txn.cursor(db=self.tables[table]) as cursor:
            more = cursor.set_range(max(prefix, start))
            while more and (key := bytes(cursor.key())).startswith(prefix):
                yield key
                more = cursor.next()

    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        with self.txn.cursor(db=self.tables[table]) as cursor:
            for key, value in cursor:
                yield bytes(key), bytes(value)

    def count(self, table: str) -> int:
        return self.txn.stat(self.tables[table])["entries"]

    def clear(self, table: str) -> None:
        self.txn.drop(self.tables[table], delete=False)


def _open(path: Path, map_size: int, readonly: bool) -> lmdb.Environment:
    env = lmdb.open(
        str(path),
        map_size=map_size,
        readonly=readonly,
        create=not readonly,
        mode=0o600,
        max_dbs=2 * len(TABLES),
        max_readers=1024,  # 64 bytes each; one per running read transaction of any process
    )
    for _ in range(5):
        needed, size = _extent(env, path)
        if size >= needed:
            break
        time.sleep(0.01)  # a writer may be between its commit and filling up the file
    else:
        env.close()
        raise StoreError(
            f"{path / 'data.mdb'} is truncated: {size} bytes, its pages need {needed}. Restore "
            f"it or delete the store and index again; to keep what is left of it, run "
            f"`truncate -s {needed} {path / 'data.mdb'}` and verify the store with repair"
        )
    env.reader_check()  # readers that were killed hold back the reuse of freed space
    return env


def _extent(env: lmdb.Environment, path: Path) -> tuple[int, int]:
    """Bytes that all pages take, and bytes of the file: past its end, a read kills the process.

    In this order: another process may be writing, and the file only grows.
    """
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return needed, (path / "data.mdb").stat().st_size


def _tables(env: lmdb.Environment, path: Path, readonly: bool) -> dict[str, Any]:
    """Handles of all tables. A new environment gets them and its format in one commit."""
    if not env.stat()["entries"]:
        if readonly:
            raise _no_store(path)
        with env.begin(write=True) as txn:
            tables = {name: env.open_db(name.encode(), txn=txn) for name in TABLES}
            txn.put(b"format", _FORMAT.pack(_MAGIC, FORMAT), db=tables["meta"])
        return tables
    foreign = StoreError(f"{path} holds an LMDB environment that is not a ragcache store")
    try:
        meta = env.open_db(b"meta", create=False)
    except lmdb.NotFoundError:
        raise foreign from None
    with env.begin() as txn:
        record = bytes(txn.get(b"format", db=meta) or b"")
    if len(record) != _FORMAT.size or not record.startswith(_MAGIC):
        raise foreign
    _, version = _FORMAT.unpack(record)
    if version > FORMAT:
        raise StoreError(
            f"the store in {path} has format {version}, this ragcache reads up to {FORMAT}: "
            "upgrade ragcache, or index into another directory"
        )
    return {name: env.open_db(name.encode(), create=False) for name in TABLES}


def _no_store(path: Path) -> StoreError:
    return StoreError(f"no store in {path}: open it for writing once to make one")
