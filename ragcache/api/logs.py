"""Logs of a service: one JSON object a line, on standard error.

What fails again and again, such as requests without a key, is said once a minute, with how often it
happened meanwhile: nobody who sends it can fill a disk.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

_EVERY_S = 60.0
_MOST = 1000  # kinds of failures that are told apart


class Once(logging.Filter):
    """Lets a failure through once in ``seconds``; ``record.repeated`` says how often it has been
    kept back since.

    Failures are warnings and errors, alike where logger, message before its values are filled in,
    and exception are; and records that have a ``failure``, alike where that is.
    """

    def __init__(self, seconds: float = _EVERY_S) -> None:
        super().__init__()
        self._seconds, self._lock = seconds, threading.Lock()
        self._told: dict[Any, tuple[float, int]] = {}  # when, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        failure = getattr(record, "failure", None)
        if failure is None and record.levelno < logging.WARNING:
            return True
        kind = record.exc_info[0] if record.exc_info else None
        key = (record.name, failure or record.msg, kind)
        with self._lock:
            at, repeated = self._told.get(key, (-self._seconds, 0))
            if (now := time.monotonic()) - at < self._seconds:
                self._told[key] = at, repeated + 1
                return False
            if len(self._told) >= _MOST:
                self._told.clear()
            self._told[key] = now, 0
        record.repeated = repeated
        return True


class Lines(logging.Formatter):
    """A line of ``ragcache.access`` as it is; any other with its time, level and logger; both with
    how often they were kept back before, if they were."""

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
    """Log so, from the whole process: info of ours, warnings of others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    handler.addFilter(Once())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ragcache", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
