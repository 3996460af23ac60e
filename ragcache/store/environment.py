"""The tables on disk: one LMDB environment, opened with care.

A directory (0700) with ``data.mdb`` and ``lock.mdb`` (LMDB's own) and ``writer.lock`` (which
process may write), all 0600. An existing store keeps the permissions that its owner gave it.
Local file systems only: LMDB maps its file and locks through shared memory.

Settings are LMDB's safe ones: every commit is synced, nothing is written through the map
(``writemap`` turns a stray pointer into damage), the kernel reads ahead (cold reads are 100 times
slower without). The map never grows: it is one huge sparse reservation of address space, not of
disk or memory.

LMDB's file never shrinks. :meth:`Environment.compact` copies what is live into a folder of its own,
``data-1``, ``data-2``, ..., and then names that folder in ``CURRENT``, by an atomic rename. Whoever
has the store open follows with its next transaction; whatever ``CURRENT`` does not name is rubbish,
which the next writer removes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import lmdb

from ragcache.errors import StoreError
from ragcache.store.directory import claim, explained, release, sync_folder
from ragcache.store.tables import TABLES, Tables, Transaction

logger = logging.getLogger(__name__)

FORMAT = 1
_FORMAT = struct.Struct("<8sI")
_MAGIC = b"ragcache"
_CURRENT = "CURRENT"
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
        self._claim: IO[bytes] | None = None
        self._seen: dict[str, float] = {}  # read transactions, and since when they have been seen
        self._looked = time.monotonic()
        with explained(self.path, "open"):
            if readonly and not (_current(self.path) / "data.mdb").is_file():
                raise _no_store(self.path)
            self._claim = None if readonly else claim(self.path)
            try:
                if not readonly:
                    _clean(self.path)
                self._opened = self._open()
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
            with opened.env.begin(buffers=True) as txn:
                yield _LmdbTransaction(txn, opened.tables)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        if self.readonly:
            raise StoreError(f"the store in {self.path} was opened with readonly=True")
        with self._writing, self._entered() as opened, explained(self.path, "write to"):
            with opened.env.begin(write=True, buffers=True) as txn:
                yield _LmdbTransaction(txn, opened.tables)
            # LMDB leaves unused pages at the end unwritten; a file that covers all pages lets
            # the next open tell a truncated one.
            needed, size = _extent(opened.env, opened.folder)
            if size < needed:
                os.truncate(opened.folder / "data.mdb", needed)
        self._look()

    def compact(self) -> tuple[int, int]:
        """Give unused space back to the file system: bytes of the file before and after.

        Readers go on meanwhile, writers wait. Killed at any point, the store is the old or the new
        one. Space that another process still has mapped is free once its next transaction begins.
        """
        if self.readonly:
            raise StoreError(f"the store in {self.path} was opened with readonly=True")
        with self._writing, explained(self.path, "compact"):
            with self._entered() as opened:
                before = (opened.folder / "data.mdb").stat().st_size
                folder = self.path / f"data-{_number(opened.folder) + 1}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(mode=0o700)
                with open(os.open(folder / "data.mdb", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as f:
                    opened.env.copyfd(f.fileno(), compact=True)
                    os.fsync(f.fileno())
                sync_folder(folder)
            part = self.path / f"{_CURRENT}.part"
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(folder.name + "\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path / _CURRENT)
            sync_folder(self.path)
            self._follow()
            _clean(self.path)
            return before, self.file.stat().st_size

    def live_bytes(self) -> int:
        """What the pages in use take: the file is as large as they were at most."""
        with self._entered() as opened, explained(self.path, "read"):
            with opened.env.begin() as txn:
                stats = [txn.stat(handle) for handle in opened.tables.values()]
            pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
            return int((pages + 4) * opened.env.stat()["psize"])  # two metas, two roots

    def long_readers(self) -> dict[str, float]:
        """Read transactions of any process that have been open for long: who, and for how many
        seconds they have been seen. While one is open, freed space cannot be used again."""
        now = time.monotonic()
        with self._entered() as opened, explained(self.path, "read"):
            opened.env.reader_check()
            lines = opened.env.readers().splitlines()[1:]
        there = [" ".join(line.split()) for line in lines if not line.rstrip().endswith("-")]
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
            self._idle.wait_for(lambda: self._opened.running == 0)
        self._release()

    def _release(self) -> None:
        if hasattr(self, "_opened"):
            self._opened.env.close()
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
        if self.readonly and _current(self.path) != self._opened.folder:
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
                if opened is not self._opened and not opened.running:
                    opened.env.close()  # the last one in what was compacted
                self._idle.notify_all()

    def _follow(self) -> None:
        """Go on with what CURRENT names; the old environment is closed with its last reader."""
        with explained(self.path, "open"), self._idle:
            if self._closed or _current(self.path) == self._opened.folder:
                return
            old, self._opened = self._opened, self._open()
            if not old.running:
                old.env.close()

    def _open(self) -> _Opened:
        for _ in range(5):
            folder = _current(self.path)
            try:
                env = _open(folder, self.map_size, self.readonly)
            except (lmdb.Error, OSError):
                if folder == _current(self.path):
                    raise
                continue  # compacted between the two lines
            try:
                return _Opened(env, folder, _tables(env, self.path, self.readonly))
            except BaseException:
                env.close()
                raise
        raise StoreError(f"the store in {self.path} is compacted all the time: try again")


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


def _current(path: Path) -> Path:
    """The folder of the LMDB environment of the store in ``path``."""
    try:
        name = (path / _CURRENT).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return path
    if not re.fullmatch(r"data-\d+", name):
        raise StoreError(
            f"{path / _CURRENT} is damaged: write the name of the folder in it that holds the "
            "newest data.mdb"
        )
    return path / name


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("data-")) if folder.name.startswith("data-") else 0


def _clean(path: Path) -> None:
    """Remove what compaction has left: every environment but the current one."""
    current = _current(path)
    for folder in path.glob("data-*"):
        if folder != current:
            shutil.rmtree(folder, ignore_errors=True)
    if current != path:
        for name in ("data.mdb", "lock.mdb"):
            with suppress(FileNotFoundError):
                (path / name).unlink()


def _no_store(path: Path) -> StoreError:
    return StoreError(f"no store in {path}: open it for writing once to make one")
