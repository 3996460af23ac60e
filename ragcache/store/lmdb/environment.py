"""The tables on disk: the directory of a store, and its current LMDB environment.

A directory (0700) with ``data.mdb`` and ``lock.mdb`` (LMDB's own) and ``writer.lock`` (which
process may write), all 0600. An existing store keeps the permissions that its owner gave it.
Local file systems only: LMDB maps its file and locks through shared memory.

LMDB's file never shrinks. :meth:`Environment.compact` copies what is live into a folder of its own,
``data-1``, ``data-2``, ..., and then names that folder, with a checksum, in ``CURRENT``, by an
atomic rename. Processes that have the store open follow with their next transaction; what
``CURRENT`` does not name is removed by the next writer once it has opened what is
named.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import lmdb

from ragcache.errors import StoreError
from ragcache.store.lmdb.current import (
    CURRENT_FILE,
    compaction_number,
    copy_compacted,
    current_folder,
    remove_old_folders,
    set_current,
)
from ragcache.store.lmdb.data_file import (
    DataFile,
    LmdbTransaction,
    ShortFileError,
    create_data_file,
    no_store_error,
    open_environment,
)
from ragcache.store.lmdb.directory import (
    LOCK_TIMEOUT_S,
    acquire_writer_lock,
    release_writer_lock,
    sync_folder,
    translate_errors,
)
from ragcache.store.lmdb.tables import Tables, Transaction

logger = logging.getLogger(__name__)

_CHECK_S = 5.0  # between two checks for long read transactions
_LONG_S = 30.0  # read transactions that are open for longer are logged


class Environment(Tables):
    """:data:`TABLES` in the directory ``path``, which is made where it is missing.

    ``map_size`` (bytes) is the most that the store can ever hold. One writer process at a time,
    LockedError for the next one; any number of processes with ``readonly``. With ``lazy`` it has to
    be there, is read as with ``readonly``, and this process becomes its writer with the first
    change: LockedError where another is that. Not usable in a child made by fork.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        map_size: int = 1 << 40,
        readonly: bool = False,
        lazy: bool = False,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.readonly = readonly
        self.map_size = map_size
        #: Called when this process becomes the writer, before its first change.
        self.on_become_writer: Callable[[], None] = lambda: None
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._writing, self._claiming = threading.Lock(), threading.Lock()
        self._closed = False
        self._compacted: list[DataFile] = []  # replaced by a compaction, and still read
        self._writer_lock: IO[bytes] | None = None
        self._seen: dict[str, float] = {}  # read transaction -> when it was first seen
        self._checked = time.monotonic()
        with translate_errors(self.path, "open"):
            try:
                if not readonly and not lazy:
                    self._writer_lock = acquire_writer_lock(self.path, LOCK_TIMEOUT_S)
                try:
                    self._opened = self._open()
                except ShortFileError:
                    if not lazy:
                        raise
                    self._writer_lock = acquire_writer_lock(self.path)
                    self._opened = self._open()
                if self._writer_lock is not None:
                    self._tidy()
            except BaseException:
                self._release()
                raise

    @property
    def is_writer(self) -> bool:
        """Whether this process holds the writer's lock."""
        return self._writer_lock is not None

    def become_writer(self) -> None:
        """Become the only writer. Raises LockedError at once where another process is it."""
        if self.readonly:
            raise StoreError(
                f"the store in {self.path} was opened with readonly=True: open it without"
            )
        with self._claiming:
            if self._writer_lock is not None:
                return
            if self._closed:
                raise self._is_closed()
            with translate_errors(self.path, "open"):
                held = acquire_writer_lock(self.path)
                try:
                    self._follow()
                    self._writer_lock = held
                    self._opened.make_tables()
                    self._tidy()
                    self.on_become_writer()
                except BaseException:
                    self._writer_lock = None
                    release_writer_lock(held)
                    raise

    def refusal(self) -> str | None:
        try:
            self.become_writer()
        except StoreError as error:
            return str(error)
        return None

    def _tidy(self) -> None:
        """Remove leftovers, and make the directory durable, as the new writer."""
        remove_old_folders(self.path)
        for folder in (self._opened.folder, self.path, self.path.parent):
            sync_folder(folder)  # so that the store survives a power loss

    @property
    def file(self) -> Path:
        """The current data file of LMDB."""
        return self._opened.file

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        with self._entered() as entered, translate_errors(self.path, "read"):
            with entered.begin() as txn:
                yield LmdbTransaction(txn, entered.tables)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        self.become_writer()
        with self._writing, self._entered() as entered, translate_errors(self.path, "write to"):
            with entered.env.begin(write=True, buffers=True) as txn:
                yield LmdbTransaction(txn, entered.tables)
            try:  # a failure here does not undo the commit
                entered.cover()
                self._warn_of_long_readers()
            except (lmdb.Error, OSError) as error:
                logger.warning("after a commit to %s: %s", self.path, error)

    def compact(self) -> tuple[int, int]:
        """Return unused space to the file system; bytes of the file before and after.

        Readers continue, writers wait. After a kill at any point, the store is the old or the new
        one. Space that another process has mapped is freed when its next transaction begins.
        """
        self.become_writer()
        with self._writing, translate_errors(self.path, "compact"):
            with self._entered() as entered:
                entered.env.reader_check()  # the copy needs a reader slot
                before = entered.file.stat().st_size
                folder = self.path / f"data-{compaction_number(entered.folder) + 1}"
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    copy_compacted(entered.env, folder)
                    set_current(self.path, folder)
                except BaseException:
                    if current_folder(self.path) != folder:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
            self._follow()
            remove_old_folders(self.path)
            return before, self.file.stat().st_size

    def live_bytes(self) -> int:
        """Bytes of the pages in use. The file is as large as the most that ever were."""
        with self._entered() as entered, translate_errors(self.path, "read"):
            return entered.live_bytes()

    def long_readers(self) -> dict[str, float]:
        """Read transactions of any process that have been open for 30 s or more, and for how many
        seconds they have been seen. While one is open, freed space cannot be reused: in the file,
        or on the disk if the store was compacted since."""
        now = time.monotonic()
        with self._entered() as entered, translate_errors(self.path, "read"):
            with self._idle:
                there = [reader for one in (entered, *self._compacted) for reader in one.readers()]
                self._close_unused()
        self._seen = {reader: self._seen.get(reader, now) for reader in there}
        return {r: now - since for r, since in self._seen.items() if now - since > _LONG_S}

    def _warn_of_long_readers(self) -> None:
        """Log long read transactions, now and then; also frees the slots of killed readers."""
        if time.monotonic() - self._checked < _CHECK_S:
            return
        self._checked = time.monotonic()
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
            self._closed = True  # no new transactions; closing unmaps what running ones read
            every = [self._opened, *self._compacted]
            self._idle.wait_for(lambda: not any(one.running for one in every))
        self._release()

    def _release(self) -> None:
        if hasattr(self, "_opened"):
            for one in (self._opened, *self._compacted):
                one.close()
        if self._writer_lock is not None and not self._writer_lock.closed:
            release_writer_lock(self._writer_lock)

    @contextmanager
    def _entered(self) -> Iterator[DataFile]:
        """The current data file, which stays open until the context ends."""
        if os.getpid() != self._pid:
            raise StoreError(
                f"the store in {self.path} was opened by process {self._pid} and cannot be used "
                f"in its fork {os.getpid()}: start workers with the spawn method, and open the "
                "store in each"
            )
        if self._writer_lock is None:
            self._follow()
        with self._idle:
            if self._closed:
                raise self._is_closed()
            entered = self._opened
            entered.running += 1
        try:
            yield entered
        finally:
            with self._idle:
                entered.running -= 1
                if (
                    entered is not self._opened
                ):  # looking for readers is too slow for every transaction
                    self._close_unused()
                self._idle.notify_all()

    def _is_closed(self) -> StoreError:
        return StoreError(f"the store in {self.path} is closed: open it again")

    def _follow(self) -> None:
        """Open what CURRENT names; the old environment is closed with its last reader."""
        with translate_errors(self.path, "open"), self._idle:
            if self._closed or current_folder(self.path) == self._opened.folder:
                return
            old, self._opened = self._opened, self._open()
            self._compacted.append(old)
            self._close_unused()

    def _close_unused(self) -> None:
        """Close replaced environments without readers; the writer, without any process's."""
        for old in [one for one in self._compacted if not one.running]:
            if self._writer_lock is None or not old.readers():
                old.close()
                self._compacted.remove(old)

    def _open(self) -> DataFile:
        for _ in range(5):
            folder = current_folder(self.path)
            named = folder != self.path
            alone = self._writer_lock is not None
            there = os.path.lexists(folder / "data.mdb")
            if not there and alone and not named:
                create_data_file(self.path, map_size=self.map_size)
            elif not there:
                if folder != current_folder(self.path):
                    continue  # compacted between the two lines
                if named:
                    raise StoreError(
                        f"{self.path / CURRENT_FILE} names {folder.name}, which holds no data.mdb: "
                        "restore it, or name the folder that does"
                    )
                raise no_store_error(self.path)
            try:
                env = open_environment(
                    folder,
                    self.path,
                    map_size=self.map_size,
                    readonly=self.readonly,
                    alone=alone,
                )
            except (lmdb.Error, OSError) as error:
                if folder != current_folder(self.path):
                    continue
                code = error.code if isinstance(error, lmdb.Error) else error.errno
                if self.readonly or alone or code not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise
                self.readonly = True  # no permission to write
                continue
            return DataFile(env, folder, self.path, alone=alone)
        raise StoreError(f"the store in {self.path} is compacted again and again: try again later")
