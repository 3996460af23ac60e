"""Codecs: one file, one class each. Add a codec by adding its line here."""

from __future__ import annotations

from ragcache.errors import ConfigError
from ragcache.store.codecs.base import Codec
from ragcache.store.codecs.raw import Raw

__all__ = ["CODECS", "Codec", "codec"]

CODECS: dict[str, Codec] = {one.name: one for one in (Raw(),)}


def codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError where there is none."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is unknown: use one of {', '.join(CODECS)}")
    return CODECS[name]
