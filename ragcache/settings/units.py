"""Durations and sizes as text: ``90s``, ``50GB``."""

from __future__ import annotations

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from ragcache.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``12h`` or ``30d``. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a duration: give one such as 90s, 15m, 12h, 30d or 2w")
    return float(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """Bytes of a size such as ``50GB``. Raises ConfigError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{text!r} is not a size: give one such as 500MB, 20GiB or 1TB") from None
