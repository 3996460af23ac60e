"""An object store, with everything that a network does to it: time-outs, retries, outages.

obstore speaks to S3 and what is compatible with it, Google Cloud Storage and Azure; a folder is
read and written here (folder.py). Retries are ours: they are counted, they also follow bytes that
fail a checksum, and a remote that does not answer is left alone for a while, so that not every
chunk of a prompt waits for it in vain.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from ragcache.errors import ConfigError, RemoteError
from ragcache.store.base import Miss
from ragcache.store.remote.counts import EventCounts
from ragcache.store.remote.folder_store import FolderStore, NotAFileError

try:
    import obstore
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        GenericError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )
    from obstore.store import from_url
except ImportError:
    raise ConfigError("a remote needs obstore: pip install 'ragcache-fusion[s3]'") from None

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_Found = TypeVar("_Found")

_SCHEMES = "s3", "gs", "az", "file"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again, and when to stop trying. Times in seconds."""

    attempts: int = 4
    first_s: float = 0.05  # before the second attempt at the longest; twice that before the third
    longest_s: float = 2.0
    read_s: float = 10.0  # of one attempt
    write_s: float = 300.0
    connect_s: float = 5.0
    give_up_s: float = 20.0  # after which nothing is tried again
    rest_s: float = 10.0  # during which a remote that failed all attempts is not asked

    def wait_s(self, failures: int) -> float:
        """Full jitter: uniform up to a bound that doubles."""
        return random.uniform(0, min(self.longest_s, self.first_s * 2 ** (failures - 1)))


@dataclass(frozen=True, slots=True)
class ObjectRange:
    """Bytes of an object, and what it was when they were read."""

    data: Any  # a buffer, read-only
    size: int  # bytes of the whole object
    tag: str  # changes with every write


class InvalidObjectError(Exception):
    """Raised for bytes that fail their check: they may have been damaged on the way. What is no
    object at all is not asked for again."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.detail)
        self.miss = miss


class Bucket:
    """Objects below ``url``: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file:///folder``.

    Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ..., or the role of the machine), never from the URL. Raises ConfigError
    for a URL that cannot be, or where obstore is not installed. All else raises RemoteError: at
    once where access is denied, or else after :class:`RetryPolicy`.
    """

    def __init__(self, url: str, patience: RetryPolicy = RetryPolicy()) -> None:  # noqa: B008
        self.url, self.patience = url, patience
        self._reads = _open_store(url, patience, patience.read_s)
        self._writes = _open_store(url, patience, patience.write_s)
        self._lock = threading.Lock()
        self._counts = EventCounts()
        self._resting = 0.0  # until when

    @property
    def counts(self) -> Counter[str]:
        """Since it was opened: ``requests``; of them, ``retries``; operations that ``failed`` in
        the end; and those ``refused`` during a rest."""
        return self._counts.snapshot()

    @property
    def is_resting(self) -> bool:
        """Whether it failed moments ago, and is not asked for a while."""
        with self._lock:
            return self._resting > time.monotonic()

    def get(
        self,
        name: str,
        start: int,
        end: int,
        *,
        tag: str | None = None,
        check: Callable[[ObjectRange], _Found],
    ) -> _Found | None:
        """What ``check`` makes of bytes ``start`` to ``end``, exclusive; fewer at the object's end.

        None where there is no such object, or with ``tag`` no longer that one. ``check`` may raise
        :class:`InvalidObjectError`: the read is then retried, and the last error is raised here.
        """
        options: dict[str, Any] = {"range": (start, end)}
        if tag is not None:
            options["if_match"] = tag

        def read() -> _Found:
            if isinstance(self._reads, FolderStore):
                return check(ObjectRange(*self._in_folder(self._reads, name, start, end, tag)))
            try:
                found = obstore.get(self._reads, name, options=cast(Any, options))
                data = found.bytes()
            except GenericError as error:
                # An empty object has no byte to begin with, which has no exception of its own.
                if start or "range" not in str(error).lower():
                    raise
                if (meta := obstore.head(self._reads, name))["size"]:
                    raise
                return check(ObjectRange(b"", 0, meta["e_tag"] or ""))
            return check(ObjectRange(data, found.meta["size"], found.meta["e_tag"] or ""))

        try:
            return self._tried(f"read {name}", read)
        except NotAFileError as error:
            raise InvalidObjectError(Miss("foreign", str(error))) from error
        except (FileNotFoundError, PreconditionError):
            return None

    def put(self, name: str, data: bytes | bytearray, *, tag: str | None = None) -> bool:
        """Write an object whole: a new one, or with ``tag`` in the place of that one.

        False where there is one already, or that one is not there any more. A folder knows no such
        condition: what is there is replaced.
        """
        try:
            return self._tried(f"write {name}", lambda: self._put(name, data, tag))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False

    def delete(self, *names: str) -> None:
        """Remove objects; those that are not there are no error."""
        for name in names:  # bulk deletion is not what every compatible store can do
            if isinstance(self._writes, FolderStore):
                self._tried(f"delete {name}", partial(self._writes.delete, name))
                continue
            with suppress(FileNotFoundError):
                self._tried(f"delete {name}", partial(obstore.delete, self._writes, name))

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Names and sizes of the objects in the folder ``prefix``, in no order."""

        def all_pages() -> list[tuple[str, int]]:  # a listing that failed cannot be gone on with
            if isinstance(self._reads, FolderStore):
                return self._reads.list(prefix)
            pages = obstore.list(self._reads, prefix)
            return [(each["path"], each["size"]) for page in pages for each in page]

        return self._tried(f"list {prefix}", all_pages)

    def _in_folder(
        self, folder: FolderStore, name: str, start: int, end: int, tag: str | None
    ) -> tuple[bytes, int, str]:
        found = folder.read(name, start, end)
        if tag is not None and found.tag != tag:
            raise FileNotFoundError(f"{name} is another object by now")
        return found

    def _put(self, name: str, data: bytes | bytearray, tag: str | None) -> bool:
        if isinstance(self._writes, FolderStore):
            return self._writes.write(name, data, replacing=tag is not None)
        mode: Any = "create" if tag is None else {"e_tag": tag}
        try:
            obstore.put(self._writes, name, data, mode=mode, use_multipart=False)
        except NotImplementedError:
            obstore.put(self._writes, name, data, use_multipart=False)
        return True

    def _tried(self, what: str, attempt: Callable[[], _Found]) -> _Found:
        """The result of the first attempt that succeeds."""
        self._check_awake(what)
        began = time.monotonic()
        for failures in range(1, self.patience.attempts + 1):
            self._counts.add("requests")
            try:
                return attempt()
            except (FileNotFoundError, AlreadyExistsError, PreconditionError, NotAFileError):
                raise  # an answer
            except (PermissionDeniedError, UnauthenticatedError) as error:
                self._counts.add("failed")
                raise RemoteError(
                    f"{self.url} does not let us {what}: {_short(error)}. Check the credentials "
                    "in the environment (AWS_ACCESS_KEY_ID, ...) and what they may do."
                ) from error
            except (BaseError, OSError, InvalidObjectError) as error:
                last: Exception = error
            late = time.monotonic() - began > self.patience.give_up_s
            if late or failures == self.patience.attempts:
                break
            self._counts.add("retries")
            time.sleep(self.patience.wait_s(failures))
        self._counts.add("failed")
        if isinstance(last, InvalidObjectError):
            raise last
        with self._lock:
            self._resting = time.monotonic() + self.patience.rest_s
        raise RemoteError(
            f"{self.url} cannot be reached: {failures} attempts to {what} failed, the last with: "
            f"{_short(last)}"
        ) from last

    def _check_awake(self, what: str) -> None:
        with self._lock:
            left = self._resting - time.monotonic()
        if left > 0:
            self._counts.add("refused")
            raise RemoteError(
                f"{self.url} failed moments ago and is left alone for {left:.0f} s: did not {what}"
            )


def _open_store(url: str, patience: RetryPolicy, timeout_s: float) -> ObjectStore | FolderStore:
    """The store behind a URL. ConfigError where there cannot be one."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not (parts.netloc or parts.path.strip("/")):
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"remote is {url!r}: give a bucket or a folder, with one of {known}")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "the remote's URL has credentials or options in it, and would be written to logs: "
            "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    try:
        if parts.scheme == "file":
            if parts.netloc:
                raise ConfigError(f"remote is {url!r}: a folder has three slashes, file:///folder")
            return FolderStore(Path(parts.path))
        return from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=timeout_s),
                "connect_timeout": timedelta(seconds=patience.connect_s),
                "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
            },
            retry_config={"max_retries": 0},
        )
    except (BaseError, OSError, ValueError) as error:
        raise ConfigError(
            f"the remote {url!r} cannot be opened: {_short(error)}. Give s3://bucket/prefix or "
            "file:///folder; credentials come from the environment."
        ) from error


def _short(error: Exception) -> str:
    """obstore's messages go on with the whole state of the client."""
    return str(error).partition("\n")[0][:300] or type(error).__name__
