"""Tells a remote what the outbox says: in the background, in order, until it has been told."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from ragcache.errors import RagCacheError
from ragcache.store import outbox
from ragcache.store.base import Miss
from ragcache.store.disk import DiskStore
from ragcache.store.link import AT_ONCE
from ragcache.store.objects import ChunkObjects
from ragcache.store.record import transcoded

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0, 60.0  # after a failure; twice as long after each one more, up to
_AT_A_TIME = 4 * AT_ONCE  # rows


class Courier:
    """A thread that empties the outbox of ``disk`` into ``objects``.

    Rows of the same tokens are carried out in order, others side by side. What fails stays where it
    is, and is tried again.
    """

    def __init__(self, disk: DiskStore, objects: ChunkObjects) -> None:
        self._disk, self._objects = disk, objects
        self._counts: Counter[str] = Counter()
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._turn = threading.Lock()  # of whoever carries rows out
        self._pool = ThreadPoolExecutor(AT_ONCE, "ragcache-send")
        self._wanted.set()  # what an earlier process has left
        self._thread = threading.Thread(target=self._run, name="ragcache-courier", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counter[str]:
        """Since it was made: chunks ``sent``."""
        return self._counts.copy()

    def wake(self) -> None:
        """Tell the thread that there is something to carry."""
        self._wanted.set()

    def flush(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Carry out everything, here and now: (done, of how many). Raises RemoteError."""
        done = 0
        while rows := self._carry():
            done += rows
            if progress is not None:
                progress(done, done + self._depth())

    def close(self, patience_s: float) -> None:
        """Carry out what can be carried out within this time, and stop. Twice is allowed."""
        if self._closed.is_set():
            return
        until = time.monotonic() + patience_s
        try:
            while time.monotonic() < until and self._carry():
                pass
        except RagCacheError as error:
            logger.warning("%s; it will be told when the store is next opened", error)
        self._closed.set()
        self._wanted.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        pause = _PAUSE_S[0]
        while self._wanted.wait() and not self._closed.is_set():
            self._wanted.clear()
            try:
                while self._carry() and not self._closed.is_set():
                    pause = _PAUSE_S[0]
            except RagCacheError as error:
                logger.warning("the remote could not be told: %s", error)
                self._closed.wait(pause)
                pause = min(2 * pause, _PAUSE_S[1])
                self._wanted.set()

    def _depth(self) -> int:
        with self._disk.tables.read() as txn:
            return outbox.depth(txn)

    def _carry(self) -> int:
        """Carry out some rows, the first ones; how many that were. Raises the first failure."""
        with self._turn:
            with self._disk.tables.read() as txn:
                rows = outbox.first(txn, _AT_A_TIME)
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row.content)]
            results = list(self._pool.map(self._tell, groups))
            told = [row for done, _ in results for row in done]
            if told:  # killed before, they are carried out once more, and change nothing
                with self._disk.tables.write() as txn:
                    for row in told:
                        outbox.told(txn, row)
            for _, failure in results:
                if failure is not None:
                    raise failure
            return len(told)

    def _tell(self, rows: Sequence[outbox.Row]) -> tuple[list[outbox.Row], RagCacheError | None]:
        """Carry out the rows of the same tokens: those that were, and the failure that ended it."""
        done: list[outbox.Row] = []
        for row in rows:
            try:
                if row.sends:
                    self._send(row)
                else:
                    self._objects.delete(row.content, row.digest)
            except RagCacheError as error:
                return done, error
            done.append(row)
        return done, None

    def _send(self, row: outbox.Row) -> None:
        """Send a chunk and its levels; one that is gone or damaged here is not sent."""
        assert row.digest is not None
        record = self._disk.record(row.digest)
        if isinstance(record, Miss):
            logger.warning("chunk %s is not sent: %s", row.digest.hex()[:12], record.detail)
            return
        sent = self._objects.put(record, replacing=True)
        for level in row.levels:
            self._objects.put(transcoded(record, level), replacing=True)
        self._counts["sent"] += sent
