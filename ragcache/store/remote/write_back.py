"""Tells a remote what the outbox says: in the background, in order, until it has been told."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from ragcache.errors import RagCacheError, RemoteError
from ragcache.store.base import ABSENT, Miss
from ragcache.store.disk import outbox
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.record import transcode
from ragcache.store.remote.bandwidth import MAX_REQUESTS
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.counts import EventCounts

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0, 60.0  # after a failure; twice as long after each one more, up to
_AT_A_TIME = 4 * MAX_REQUESTS  # rows


class WriteBack:
    """A thread that empties the outbox of ``disk`` into ``objects``, where this process may write
    the store: else whoever writes it has a courier too.

    Rows of the same tokens are carried out in order, others side by side. Rows that fail stay where
    they are while all others are carried out, and are tried again. A chunk that cannot be sent,
    however often it is tried, is not waited for: it stays here, is counted, and the log says why.
    """

    def __init__(self, disk: DiskStore, objects: ChunkObjects) -> None:
        self._disk, self._objects = disk, objects
        self._counts = EventCounts()
        self._failed: dict[bytes, Exception] = {}  # by contents whose rows are to be tried again
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._turn = threading.Lock()  # of whoever carries rows out
        self._pool = ThreadPoolExecutor(MAX_REQUESTS, "ragcache-send")
        self._wanted.set()  # what an earlier process has left
        self._thread = threading.Thread(target=self._run, name="ragcache-write-back", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counter[str]:
        """Since it was made: chunks ``sent``, and those ``unsent`` since they cannot be."""
        return self._counts.snapshot()

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
        except Exception:
            logger.exception("the remote could not be told; it will be when the store is opened")
        finally:
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
                continue
            except RagCacheError as error:
                logger.warning("the remote could not be told: %s", error)
            except Exception:  # whatever it was: what waits would wait for ever
                logger.exception("the remote could not be told")
            self._closed.wait(pause)
            pause = min(2 * pause, _PAUSE_S[1])
            self._wanted.set()

    def _depth(self) -> int:
        with self._disk.tables.read() as txn:
            return outbox.depth(txn)

    def _carry(self) -> int:
        """Carry out some rows, the first of those that have not failed; how many were tried. Once
        there are no others, or nothing gets through, raises the first failure, and the next call
        begins again with all."""
        with self._turn:
            with self._disk.tables.read() as txn:
                rows = outbox.first_rows(txn, _AT_A_TIME, without=self._failed)
            if not rows or self._disk.refusal() is not None:
                self._raise_failed()
                return 0
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row.content)]
            results = list(self._pool.map(self._tell, groups))
            told = [row for done, _ in results for row in done]
            if told:  # killed before, they are carried out once more, and change nothing
                with self._disk.tables.write() as txn:
                    for row in told:
                        outbox.remove(txn, row)
            for group, (_, failure) in zip(groups, results, strict=True):
                if failure is not None:
                    self._failed[group[0].content] = failure
            if self._objects.bucket.is_resting:
                self._raise_failed()
            return len(rows)

    def _raise_failed(self) -> None:
        failed, self._failed = self._failed, {}
        for failure in failed.values():
            raise failure

    def _tell(
        self, rows: Sequence[outbox.OutboxRow]
    ) -> tuple[list[outbox.OutboxRow], Exception | None]:
        """Carry out the rows of the same tokens: those that were, and the failure that ended it."""
        done: list[outbox.OutboxRow] = []
        for row in rows:
            try:
                if row.sends:
                    self._send(row)
                else:
                    self._objects.delete(row.content, row.digest)
            except Exception as error:  # each has its own, and none may keep the others
                return done, error
            done.append(row)
        return done, None

    def _send(self, row: outbox.OutboxRow) -> None:
        """Send a chunk and its copies in other codecs. A chunk that is gone or damaged, or of which
        not every copy can be made, is not sent."""
        assert row.digest is not None
        name = row.digest.hex()[:12]
        record = self._disk.record(row.digest)
        if isinstance(record, Miss):
            if record != ABSENT:  # it has not been deleted or evicted since
                logger.warning("chunk %s is not sent: %s", name, record.detail)
                self._counts.add("unsent")
            return
        try:
            every = [record, *(transcode(record, copy) for copy in row.copies)]
            sent = [self._objects.put(each, replacing=True) for each in every]
        except RemoteError:
            raise
        except RagCacheError as error:
            logger.warning("chunk %s is not sent, and stays here: %s", name, error)
            self._counts.add("unsent")
        except Exception:
            logger.exception("chunk %s is not sent, and stays here", name)
            self._counts.add("unsent")
        else:
            self._counts.add("sent", sent[0])
