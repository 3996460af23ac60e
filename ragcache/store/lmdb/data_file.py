"""One LMDB data file (``data.mdb``): creating and opening it safely, its format, transactions.

Settings are LMDB's safe ones: every commit is synced, nothing is written through the map
(``writemap`` lets a stray pointer damage data), and the kernel reads ahead (cold reads are 100
times slower without). The map never grows: it reserves address space, not disk or memory.

A read past the end of the file kills the process. So before anything is read, the file is checked
to cover all pages that LMDB has ever allocated.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from ragcache.errors import StoreError
from ragcache.store.lmdb.directory import NEW_DATA_FILE, refuse_links, sync_folder
from ragcache.store.lmdb.tables import TABLES, Transaction

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LATER = {"outbox", "promises", "texts"}  # missing in stores of earlier releases
_FORMAT = struct.Struct("<8sI")
_MAGIC = b"ragcache"


class ShortFileError(StoreError):
    """The file is shorter than its pages. A writer can find out whether anything is missing."""


class DataFile:
    """The data file in ``folder``, of the store in ``path``. ``env`` comes from
    :func:`open_environment`. ``alone``: this process is the writer.

    Closes ``env`` and raises StoreError where it is not a store, or has a later format.
    """

    def __init__(self, env: lmdb.Environment, folder: Path, path: Path, *, alone: bool) -> None:
        self.env, self.folder = env, folder
        self.running = 0  # transactions, counted by the owner
        try:
            self.tables = _tables(env, path, alone)
        except BaseException:
            env.close()
            raise

    @property
    def file(self) -> Path:
        return self.folder / "data.mdb"

    def make_tables(self) -> None:
        """Make the tables that a store of an earlier release lacks. Running transactions do not see
        them."""
        self.tables = {
            name: self.env.open_db(name.encode()) if db is None else db
            for name, db in self.tables.items()
        }

    def begin(self) -> lmdb.Transaction[Any]:
        """A read transaction. Where all reader slots are used, frees those of killed processes."""
        try:
            return self.env.begin(buffers=True)
        except lmdb.ReadersFullError:
            self.env.reader_check()
            return self.env.begin(buffers=True)

    def cover(self) -> None:
        """Extend the file to all of its pages, after a commit.

        LMDB does not write unused pages at the end; without this, the next open could not tell such
        a file from a truncated one.
        """
        needed, size = _extent(self.env, self.folder)
        if size < needed:
            os.truncate(self.file, needed)

    def readers(self) -> list[str]:
        """The read transactions of all live processes: pid, thread and number of each."""
        self.env.reader_check()
        lines = self.env.readers().splitlines()[1:]
        return [" ".join(line.split()) for line in lines if not line.rstrip().endswith("-")]

    def live_bytes(self) -> int:
        """Bytes of the pages in use. The file is as large as the most that ever were."""
        with self.env.begin() as txn:
            stats = [txn.stat(db) for db in self.tables.values() if db is not None]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        return int((pages + 4) * self.env.stat()["psize"])  # two metas, two roots

    def close(self) -> None:
        self.env.close()


class LmdbTransaction(Transaction):
    """A transaction of LMDB. ``tables``: handles by name, None for a missing table."""

    def __init__(self, txn: lmdb.Transaction[Any], tables: dict[str, Any]) -> None:
        self.txn = txn
        self.tables = tables

    def view(self, table: str, key: bytes) -> memoryview | None:
        if (db := self.tables[table]) is None:
            return None
        value: memoryview | None = self.txn.get(key, db=db)
        return value

    def put(self, table: str, key: bytes, value: bytes | memoryview) -> None:
        self.txn.put(key, value, db=self.tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        return self.txn.delete(key, db=self.tables[table])

    def keys(self, table: str, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[bytes]:
        if (db := self.tables[table]) is None:
            return
        with self.txn.cursor(db=db) as cursor:
            more = cursor.set_range(max(prefix, start))
            while more and (key := bytes(cursor.key())).startswith(prefix):
                yield key
                more = cursor.next()

    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        if (db := self.tables[table]) is None:
            return
        with self.txn.cursor(db=db) as cursor:
            for key, value in cursor:
                yield bytes(key), bytes(value)

    def count(self, table: str) -> int:
        db = self.tables[table]
        return 0 if db is None else self.txn.stat(db)["entries"]

    def clear(self, table: str) -> None:
        self.txn.drop(self.tables[table], delete=False)


def create_data_file(path: Path, *, map_size: int) -> None:
    """Make the data file of a new store, with all its tables, or no file at all."""
    file, lock = path / NEW_DATA_FILE, path / f"{NEW_DATA_FILE}-lock"
    for left in (file, lock):
        left.unlink(missing_ok=True)
    env = _open(file, map_size, readonly=False, subdir=False)
    try:
        _make_tables(env)
        env.sync(True)
    finally:
        env.close()
    lock.unlink()
    file.rename(path / "data.mdb")
    sync_folder(path)


def open_environment(
    folder: Path, path: Path, *, map_size: int, readonly: bool, alone: bool
) -> lmdb.Environment:
    """Open the LMDB environment in ``folder``, of the store in ``path``, and check that its file
    covers all pages. ``alone``: this process is the writer, and may extend the file.

    Raises StoreError where the file is truncated; lmdb.Error and OSError where it cannot be opened.
    """
    refuse_links(folder, "data.mdb", "lock.mdb")
    file = folder / "data.mdb"
    if file.is_file() and not file.stat().st_size:
        raise StoreError(
            f"{file} is damaged: it is empty, and LMDB never leaves it so. Restore it from a "
            "backup, or delete the directory and index again"
        )
    env = _open(folder, map_size, readonly)
    for _ in range(1 if alone else 5):
        needed, size = _extent(env, folder)
        if size >= needed:
            break
        time.sleep(0.01)  # a writer may be between its commit and filling up the file
    else:
        env.close()
        if not alone:
            raise ShortFileError(
                f"{file} is {needed - size} bytes short: a writer was killed, or the file was "
                "cut. Open the store for writing once, with `ragcache verify --repair`, which "
                "tells the two apart"
            )
        _complete(file, size, needed, path)
        env = _open(folder, map_size, readonly)
    env.reader_check()  # readers that were killed hold back the reuse of freed space
    return env


def _open(path: Path, map_size: int, readonly: bool, *, subdir: bool = True) -> lmdb.Environment:
    return lmdb.open(
        os.fsencode(path),  # a path need not be text
        subdir=subdir,
        map_size=map_size,
        readonly=readonly,
        create=not readonly,
        mode=0o600,
        max_dbs=2 * len(TABLES),
        max_readers=1024,  # 64 bytes each; one per running read transaction of any process
    )


def _complete(file: Path, size: int, needed: int, path: Path) -> None:
    """Extend a file that is shorter than its pages; StoreError if anything is missing.

    LMDB syncs all used pages before it commits, but does not write unused pages at the end. So the
    process may have been killed just after a commit, and the file is complete, or the file was
    truncated. Reading everything tells; this happens in another process, since a read of a missing
    page kills the process.
    """
    _resize(file, needed)
    command = [sys.executable, "-m", "ragcache.store.disk", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        _resize(file, size)
        raise StoreError(
            f"{file} is truncated: {size} bytes, its pages need {needed}. Restore it or delete "
            "the store and index again; to keep what is left of it, run "
            f"`truncate -s {needed} {file}` and verify the store with repair"
        )
    logger.warning("%s was %d bytes short, and is whole", file, needed - size)


def _resize(file: Path, size: int) -> None:
    with file.open("r+b") as data:
        data.truncate(size)
        os.fsync(data.fileno())


def _extent(env: lmdb.Environment, folder: Path) -> tuple[int, int]:
    """Bytes of all pages, and bytes of the file.

    Read in this order, since another process may be writing and the file only grows.
    """
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return needed, (folder / "data.mdb").stat().st_size


def _make_tables(env: lmdb.Environment) -> dict[str, Any]:
    """Make all tables, and record the format, in one commit."""
    with env.begin(write=True) as txn:
        tables = {name: env.open_db(name.encode(), txn=txn) for name in TABLES}
        txn.put(b"format", _FORMAT.pack(_MAGIC, _FORMAT_VERSION), db=tables["meta"])
    return tables


def _tables(env: lmdb.Environment, path: Path, alone: bool) -> dict[str, Any]:
    """Handles of all tables. Makes them where an earlier release was killed before it had made
    any."""
    if not env.stat()["entries"]:
        if not alone:
            raise no_store_error(path)
        return _make_tables(env)
    foreign = StoreError(
        f"{path} holds an LMDB environment that is not a ragcache store: give another directory"
    )
    try:
        meta = env.open_db(b"meta", create=False)
    except lmdb.NotFoundError:
        raise foreign from None
    with env.begin() as txn:
        record = bytes(txn.get(b"format", db=meta) or b"")
    if len(record) != _FORMAT.size or not record.startswith(_MAGIC):
        raise foreign
    _, version = _FORMAT.unpack(record)
    if version > _FORMAT_VERSION:
        raise StoreError(
            f"the store in {path} has format {version}, this ragcache reads up to "
            f"{_FORMAT_VERSION}: upgrade ragcache, or index into another directory"
        )
    return {name: _table(env, name, alone) for name in TABLES}


def _table(env: lmdb.Environment, name: str, alone: bool) -> Any:
    """The handle of a table; None for a missing one that cannot be made."""
    later = name in _LATER
    try:
        return env.open_db(name.encode(), create=later and alone)
    except (lmdb.NotFoundError, lmdb.ReadonlyError):
        if later:
            return None
        raise


def no_store_error(path: Path) -> StoreError:
    """The error for opening a store that does not exist."""
    return StoreError(
        f"there is no store in {path}. Make one: ragcache index PATH... --store {path}"
    )
