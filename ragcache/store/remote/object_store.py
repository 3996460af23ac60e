"""An object store with timeouts, retries and a circuit breaker.

obstore implements S3 and compatible stores, Google Cloud Storage and Azure; folder_store.py
implements directories. Retries are made here: they are counted, they cover bytes that fail a
checksum, and after all attempts have failed the remote is not asked for a while, so that not every
chunk of a prompt waits for it.
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

__all__ = ["Bucket"]

_Found = TypeVar("_Found")

_SCHEMES = "s3", "gs", "az", "file"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to retry, and when to give up. Times in seconds."""

    attempts: int = 4
    first_s: float = 0.05  # longest wait before the second attempt; doubles after each
    longest_s: float = 2.0
    read_s: float = 10.0  # of one attempt
    write_s: float = 300.0
    connect_s: float = 5.0
    give_up_s: float = 20.0  # no retry after this time
    rest_s: float = 10.0  # without requests, after all attempts have failed

    def wait_s(self, failures: int) -> float:
        """The wait after so many failures, with full jitter: uniform up to a bound that doubles."""
        return random.uniform(0, min(self.longest_s, self.first_s * 2 ** (failures - 1)))


@dataclass(frozen=True, slots=True)
class ObjectRange:
    """Bytes of an object, with its size and tag when they were read."""

    data: Any  # a buffer, read-only
    size: int  # bytes of the whole object
    tag: str  # changes with every write


class InvalidObjectError(Exception):
    """The bytes of an object fail their check, as ``miss`` says. Raised by a check, the read is
    retried, for they may have been damaged in transit."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.detail)
        self.miss = miss


class Bucket:
    """Objects below ``url``: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file:///folder``.

    Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ..., or the role of the machine), never from the URL. Raises ConfigError
    for an invalid URL. Operations raise RemoteError: at once where access is denied, else after the
    attempts of ``patience``.
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
        """``requests``, ``retries`` among them, operations that ``failed`` after all retries, and
        operations ``refused`` after a failure."""
        return self._counts.snapshot()

    @property
    def is_resting(self) -> bool:
        """Whether an operation failed within the last seconds, so that none is tried."""
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
        """The result of ``check`` on bytes ``start`` to ``end`` (exclusive), or up to the object's
        end.

        None where there is no such object, or none with this ``tag``. ``check`` may raise
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
                # A range of an empty object is an error, without an exception of its own.
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
        """Write an object whole: a new one, or with ``tag`` a replacement of the one with this tag.

        False where there is one already, or none with this tag. A directory does not support the
        latter condition, and replaces any.
        """
        try:
            return self._tried(f"write {name}", lambda: self._put(name, data, tag))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False

    def delete(self, *names: str) -> None:
        """Delete objects, if they exist."""
        for name in names:  # not every compatible store supports bulk deletion
            if isinstance(self._writes, FolderStore):
                self._tried(f"delete {name}", partial(self._writes.delete, name))
                continue
            with suppress(FileNotFoundError):
                self._tried(f"delete {name}", partial(obstore.delete, self._writes, name))

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Names and sizes of the objects below ``prefix``, in no particular order."""

        def all_pages() -> list[tuple[str, int]]:  # a failed listing cannot be continued
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
    """The store at a URL. Raises ConfigError for an invalid one."""
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
    """The first line: obstore's messages continue with the state of the client."""
    return str(error).partition("\n")[0][:300] or type(error).__name__
