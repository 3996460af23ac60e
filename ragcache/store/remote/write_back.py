"""Write-back: sends the pending writes of the outbox to a remote, in the background."""

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

_PAUSE_S = 1.0, 60.0  # after a failure: the first pause, which doubles up to the second
_AT_A_TIME = 4 * MAX_REQUESTS  # rows


class WriteBack:
    """A thread that carries out the outbox of ``disk`` on ``objects``, if this process is the
    store's writer; else the writer's own thread does.

    Rows with the same content are carried out in order, others concurrently. Rows that fail are
    retried after all others. A chunk that can never be sent is dropped from the outbox: it stays
    here, is counted, and the reason is logged.
    """

    def __init__(self, disk: DiskStore, objects: ChunkObjects) -> None:
        self._disk, self._objects = disk, objects
        self._counts = EventCounts()
        self._failed: dict[bytes, Exception] = {}  # by content; to be retried
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._turn = threading.Lock()  # held while rows are carried out
        self._pool = ThreadPoolExecutor(MAX_REQUESTS, "ragcache-send")
        self._wanted.set()  # an earlier process may have left rows
        self._thread = threading.Thread(target=self._run, name="ragcache-write-back", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counter[str]:
        """Chunks ``sent``, and chunks ``unsent`` since they cannot be sent."""
        return self._counts.snapshot()

    def wake(self) -> None:
        """Tell the thread that there are new rows."""
        self._wanted.set()

    def flush(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Carry out all rows now. ``progress`` is called with (done, total). Raises RemoteError."""
        done = 0
        while rows := self._carry():
            done += rows
            if progress is not None:
                progress(done, done + self._depth())

    def close(self, patience_s: float) -> None:
        """Carry out rows for up to ``patience_s`` seconds, then stop. Closing twice is allowed."""
        if self._closed.is_set():
            return
        until = time.monotonic() + patience_s
        try:
            while time.monotonic() < until and self._carry():
                pass
        except RagCacheError as error:
            logger.warning("%s; the rest is sent when the store is next opened", error)
        except Exception:
            logger.exception(
                "the pending writes could not be sent; they are when the store is next opened"
            )
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
                logger.warning("pending writes could not be sent: %s", error)
            except Exception:  # the thread must go on, whatever it was
                logger.exception("pending writes could not be sent")
            self._closed.wait(pause)
            pause = min(2 * pause, _PAUSE_S[1])
            self._wanted.set()

    def _depth(self) -> int:
        with self._disk.tables.read() as txn:
            return outbox.depth(txn)

    def _carry(self) -> int:
        """Carry out some rows, the first that have not failed; the number of rows tried. When only
        failed rows are left, or the remote is down, raises the first failure; the next call then
        starts again with all rows."""
        with self._turn:
            with self._disk.tables.read() as txn:
                rows = outbox.first_rows(txn, _AT_A_TIME, without=self._failed)
            if not rows or self._disk.refusal() is not None:
                self._raise_failed()
                return 0
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row.content)]
            results = list(self._pool.map(self._carry_out, groups))
            done_rows = [row for done, _ in results for row in done]
            if done_rows:  # after a kill before this, repeating them changes nothing
                with self._disk.tables.write() as txn:
                    for row in done_rows:
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

    def _carry_out(
        self, rows: Sequence[outbox.OutboxRow]
    ) -> tuple[list[outbox.OutboxRow], Exception | None]:
        """Carry out rows with the same content: the rows done, and the failure that stopped it."""
        done: list[outbox.OutboxRow] = []
        for row in rows:
            try:
                if row.sends:
                    self._send(row)
                else:
                    self._objects.delete(row.content, row.digest)
            except Exception as error:  # must not stop the other groups
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
            if record != ABSENT:  # not deleted or evicted since
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
