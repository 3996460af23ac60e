"""The tables on disk: one LMDB environment, opened with care.

A directory (0700) with ``data.mdb`` and ``lock.mdb`` (LMDB's own) and ``writer.lock`` (which
process may write), all 0600. An existing store keeps the permissions that its owner gave it.
Local file systems only: LMDB maps its file and locks through shared memory.

Settings are LMDB's safe ones: every commit is synced, nothing is written through the map
(``writemap`` turns a stray pointer into damage), the kernel reads ahead (cold reads are 100 times
slower without). The map never grows: it is one huge sparse reservation of address space, not of
disk or memory.

LMDB's file never shrinks. :meth:`Environment.compact` copies what is live into a folder of its own,
``data-1``, ``data-2``, ..., and then names that folder, with a checksum, in ``CURRENT``, by an
atomic rename. Whoever has the store open follows with its next transaction; what ``CURRENT`` does
not name is rubbish, which the next writer removes once it has opened what is named.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lmdb

from ragcache.errors import StoreError
from ragcache.store.current import CURRENT, clean, copy_into, current, number_of, set_current
from ragcache.store.directory import claim, explained, release, sync_folder
from ragcache.store.tables import TABLES, Tables, Transaction

logger = logging.getLogger(__name__)

FORMAT = 1
_LATER = {"outbox"}  # tables that a store of an earlier release may lack
_FORMAT = struct.Struct("<8sI")
_MAGIC = b"ragcache"
_LOOK_S = 5.0  # between two looks at who reads
_LONG_S = 30.0  # from here on a read transaction is worth a word


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
        self.map_size = map_size
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._writing = threading.Lock()
        self._closed = False
        self._left: list[_Opened] = []  # environments that were compacted and are still read
        self._claim: IO[bytes] | None = None
        self._seen: dict[str, float] = {}  # read transactions, and since when they have been seen
        self._looked = time.monotonic()
        with explained(self.path, "open"):
            if readonly and not (current(self.path) / "data.mdb").is_file():
                raise _no_store(self.path)
            self._claim = None if readonly else claim(self.path)
            try:
                self._opened = self._open()
                if not readonly:
                    clean(self.path)
                    for folder in (self._opened.folder, self.path, self.path.parent):
                        sync_folder(folder)  # a store that was opened is there after a power loss
            except BaseException:
                self._release()
                raise

    @property
    def file(self) -> Path:
        """LMDB's data file at the moment."""
        return self._opened.folder / "data.mdb"

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        with self._entered() as opened, explained(self.path, "read"):
            with _begin(opened.env) as txn:
                yield _LmdbTransaction(txn, opened.tables)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        if self.readonly:
            raise StoreError(
                f"the store in {self.path} was opened with readonly=True: open it without"
            )
        with self._writing, self._entered() as opened, explained(self.path, "write to"):
            with opened.env.begin(write=True, buffers=True) as txn:
                yield _LmdbTransaction(txn, opened.tables)
            try:  # what is committed is committed, whatever becomes of this
                # LMDB leaves unused pages at the end unwritten; a file that covers all pages lets
                # the next open tell a truncated one.
                needed, size = _extent(opened.env, opened.folder)
                if size < needed:
                    os.truncate(opened.folder / "data.mdb", needed)
                self._look()
            except (lmdb.Error, OSError) as error:
                logger.warning("after a commit to %s: %s", self.path, error)

    def compact(self) -> tuple[int, int]:
        """Give unused space back to the file system: bytes of the file before and after.

        Readers go on meanwhile, writers wait. Killed at any point, the store is the old or the new
        one. Space that another process still has mapped is free once its next transaction begins.
        """
        if self.readonly:
            raise StoreError(
                f"the store in {self.path} was opened with readonly=True: open it without"
            )
        with self._writing, explained(self.path, "compact"):
            with self._entered() as opened:
                opened.env.reader_check()  # the copy takes the place of a reader
                before = (opened.folder / "data.mdb").stat().st_size
                folder = self.path / f"data-{number_of(opened.folder) + 1}"
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    copy_into(opened.env, folder)
                    set_current(self.path, folder)
                except BaseException:
                    if current(self.path) != folder:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
            self._follow()
            clean(self.path)
            return before, self.file.stat().st_size

    def live_bytes(self) -> int:
        """What the pages in use take: the file is as large as they were at most."""
        with self._entered() as opened, explained(self.path, "read"):
            with opened.env.begin() as txn:
                stats = [txn.stat(db) for db in opened.tables.values() if db is not None]
            pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
            return int((pages + 4) * opened.env.stat()["psize"])  # two metas, two roots

    def long_readers(self) -> dict[str, float]:
        """Read transactions of any process that have been open for long: who, and for how many
        seconds they have been seen. While one is open, freed space cannot be used again: in the
        file, or on the disk if what it reads was compacted since."""
        now = time.monotonic()
        with self._entered() as opened, explained(self.path, "read"):
            with self._idle:
                there = [line for one in (opened, *self._left) for line in _reading(one.env)]
                self._let_go()
        self._seen = {reader: self._seen.get(reader, now) for reader in there}
        return {r: now - since for r, since in self._seen.items() if now - since > _LONG_S}

    def _look(self) -> None:
        """Now and then, say who holds space back, and let go of readers that were killed."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        for reader, seconds in self.long_readers().items():
            logger.warning(
                "a read transaction (pid, thread, number: %s) on %s has been open for %d s or "
                "more: until it ends, freed space cannot be used again and the file grows",
                reader,
                self.path,
                seconds,
            )

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child must leave the parent's environment alone
        with self._idle:
            self._closed = True  # no new ones; then wait, for closing unmaps what they read
            every = [self._opened, *self._left]
            self._idle.wait_for(lambda: not any(one.running for one in every))
        self._release()

    def _release(self) -> None:
        if hasattr(self, "_opened"):
            for one in (self._opened, *self._left):
                one.env.close()
        if self._claim is not None and not self._claim.closed:
            release(self._claim)

    @contextmanager
    def _entered(self) -> Iterator[_Opened]:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the store in {self.path} was opened by process {self._pid} and cannot be used "
                f"in its fork {os.getpid()}: start workers with the spawn method, and open the "
                "store in each"
            )
        if self.readonly:
            self._follow()
        with self._idle:
            if self._closed:
                raise StoreError(f"the store in {self.path} is closed: open it again")
            opened = self._opened
            opened.running += 1
        try:
            yield opened
        finally:
            with self._idle:
                opened.running -= 1
                if opened is not self._opened:  # asking who reads is not for every transaction
                    self._let_go()
                self._idle.notify_all()

    def _follow(self) -> None:
        """Go on with what CURRENT names; the old environment is closed with its last reader."""
        with explained(self.path, "open"), self._idle:
            if self._closed or current(self.path) == self._opened.folder:
                return
            old, self._opened = self._opened, self._open()
            self._left.append(old)
            self._let_go()

    def _let_go(self) -> None:
        """Close what was left behind and is not read any more; a writer waits for all processes."""
        for old in [one for one in self._left if not one.running]:
            if self.readonly or not _reading(old.env):
                old.env.close()
                self._left.remove(old)

    def _open(self) -> _Opened:
        for _ in range(5):
            folder = current(self.path)
            if folder != self.path and not (folder / "data.mdb").is_file():
                if folder == current(self.path):
                    raise StoreError(
                        f"{self.path / CURRENT} names {folder.name}, which holds no data.mdb: "
                        "restore it, or name the folder that does"
                    )
                continue  # compacted between the two lines
            try:
                env = _open(folder, self.map_size, self.readonly)
                needed, size = _extent(env, folder)
                if size < needed and not self.readonly:
                    env.close()
                    self._complete(folder / "data.mdb", size, needed)
                    env = _open(folder, self.map_size, self.readonly)
            except (lmdb.Error, OSError):
                if folder == current(self.path):
                    raise
                continue
            try:
                return _Opened(env, folder, _tables(env, self.path, self.readonly))
            except BaseException:
                env.close()
                raise
        raise StoreError(f"the store in {self.path} is compacted all the time: try again")

    def _complete(self, file: Path, size: int, needed: int) -> None:
        """Give a file that is too short the bytes that it lacks; StoreError if they were needed.

        LMDB syncs every page that it needs before it commits, but leaves pages at the end that
        nothing uses unwritten. So such a file may be that of a process that was killed just behind
        a commit, and whole, or one that was cut. Reading everything tells; in a process of its own,
        for LMDB ends the process that comes upon a page that is none.
        """
        _resize(file, needed)
        command = [sys.executable, "-m", "ragcache.store.check", str(self.path)]
        if subprocess.run(command, capture_output=True).returncode:
            _resize(file, size)
            raise StoreError(
                f"{file} is truncated: {size} bytes, its pages need {needed}. Restore it or delete "
                "the store and index again; to keep what is left of it, run "
                f"`truncate -s {needed} {file}` and verify the store with repair"
            )
        logger.warning("%s was %d bytes short, and is whole", file, needed - size)


class _Opened:
    """An environment, and how many transactions run in it."""

    def __init__(self, env: lmdb.Environment, folder: Path, tables: dict[str, Any]) -> None:
        self.env, self.folder, self.tables = env, folder, tables
        self.running = 0


class _LmdbTransaction(Transaction):
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
    for _ in range(5 if readonly else 0):
        needed, size = _extent(env, path)
        if size >= needed:
            break
        time.sleep(0.01)  # a writer may be between its commit and filling up the file
    else:
        if readonly:
            env.close()
            raise StoreError(
                f"{path / 'data.mdb'} is {needed - size} bytes short: a writer was killed, or the "
                "file was cut. Open the store for writing once, with `ragcache verify --repair`, "
                "which tells the two apart"
            )
    env.reader_check()  # readers that were killed hold back the reuse of freed space
    return env


def _resize(file: Path, size: int) -> None:
    with file.open("r+b") as data:
        data.truncate(size)
        os.fsync(data.fileno())


def _begin(env: lmdb.Environment) -> lmdb.Transaction[Any]:
    """A read transaction; where readers that were killed have all the places, theirs are taken."""
    try:
        return env.begin(buffers=True)
    except lmdb.ReadersFullError:
        env.reader_check()
        return env.begin(buffers=True)


def _reading(env: lmdb.Environment) -> list[str]:
    """The read transactions of all processes, without those that were killed."""
    env.reader_check()
    lines = env.readers().splitlines()[1:]
    return [" ".join(line.split()) for line in lines if not line.rstrip().endswith("-")]


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
    if version > FORMAT:
        raise StoreError(
            f"the store in {path} has format {version}, this ragcache reads up to {FORMAT}: "
            "upgrade ragcache, or index into another directory"
        )
    return {name: _table(env, name, readonly) for name in TABLES}


def _table(env: lmdb.Environment, name: str, readonly: bool) -> Any:
    """The handle of a table; None of one that is not there yet, and only read."""
    later = name in _LATER
    try:
        return env.open_db(name.encode(), create=later and not readonly)
    except (lmdb.NotFoundError, lmdb.ReadonlyError):
        if later:
            return None
        raise


def _no_store(path: Path) -> StoreError:
    return StoreError(f"no store in {path}: open it for writing once to make one")
