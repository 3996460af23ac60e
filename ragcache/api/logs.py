"""Logs of a service: one JSON object a line, on standard error."""

from __future__ import annotations

import json
import logging
import sys


class Lines(logging.Formatter):
    """A line of ``ragcache.access`` as it is; any other with its time, level and logger."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "ragcache.access":
            return record.getMessage()
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure() -> None:
    """Log so, from the whole process: info of ours, warnings of others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ragcache", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
