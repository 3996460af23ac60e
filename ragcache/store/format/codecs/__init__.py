"""Codecs, one file and one class each. To add a codec, add its line in :data:`CODECS`."""

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
    """The codec called ``name``. Raises ConfigError if there is none, or a package is missing."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is unknown: use one of {', '.join(CODECS)}")
    CODECS[name].check()
    return CODECS[name]
