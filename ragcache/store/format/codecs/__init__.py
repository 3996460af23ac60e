"""Codecs: one file, one class each. Add a codec by adding its line here."""

from __future__ import annotations

from ragcache.errors import ConfigError
from ragcache.store.format.codecs.base import Codec
from ragcache.store.format.codecs.cachegen import CacheGen
from ragcache.store.format.codecs.cast import Cast
from ragcache.store.format.codecs.fp8 import Fp8
from ragcache.store.format.codecs.int8 import Int8
from ragcache.store.format.codecs.raw import Raw

__all__ = ["CODECS", "Codec", "codec"]

CODECS: dict[str, Codec] = {
    "raw": Raw(),
    "bfloat16": Cast("bfloat16"),
    "float16": Cast("float16"),
    "int8": Int8(),
    "fp8": Fp8(),
    "cachegen": CacheGen(),
}


def codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError where there is none, or it cannot be used here."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is unknown: use one of {', '.join(CODECS)}")
    CODECS[name].check()
    return CODECS[name]
