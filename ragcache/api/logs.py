"""Logs of the service: one JSON object per line, on standard error.

A failure that repeats, such as requests without an API key, is logged once a minute with the number
of repetitions, so that no client can fill the disk.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

_INTERVAL_S = 60.0
_MAX_KINDS = 1000  # of failures that are distinguished


class RepeatFilter(logging.Filter):
    """Passes each failure once in ``seconds``; ``record.repeated`` is how often it was suppressed
    since it last passed.

    Failures are warnings and errors, which are the same if their logger, their message template and
    their exception type are; and records with an attribute ``failure``, which are the same if that
    is.
    """

    def __init__(self, seconds: float = _INTERVAL_S) -> None:
        super().__init__()
        self._seconds, self._lock = seconds, threading.Lock()
        self._passed: dict[Any, tuple[float, int]] = {}  # when, and how often suppressed since

    def filter(self, record: logging.LogRecord) -> bool:
        failure = getattr(record, "failure", None)
        if failure is None and record.levelno < logging.WARNING:
            return True
        kind = record.exc_info[0] if record.exc_info else None
        key = (record.name, failure or record.msg, kind)
        with self._lock:
            at, repeated = self._passed.get(key, (-self._seconds, 0))
            if (now := time.monotonic()) - at < self._seconds:
                self._passed[key] = at, repeated + 1
                return False
            if len(self._passed) >= _MAX_KINDS:
                self._passed.clear()
            self._passed[key] = now, 0
        record.repeated = repeated
        return True


class JsonFormatter(logging.Formatter):
    """Formats records as JSON. The logger ``ragcache.access`` has JSON messages already; others get
    their time, level and logger. Both get the number of suppressed repetitions, if any."""

    def format(self, record: logging.LogRecord) -> str:
        repeated = getattr(record, "repeated", 0)
        if record.name == "ragcache.access":
            line = record.getMessage()
            return f'{line[:-1]}, "repeated": {repeated}}}' if repeated else line
        found: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        if repeated:
            found["repeated"] = repeated
        return json.dumps(found)


def configure() -> None:
    """Configure this process's logging: INFO for ragcache and uvicorn, WARNING for all else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ragcache", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
