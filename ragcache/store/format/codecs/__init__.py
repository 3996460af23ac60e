"""Codecs, one file and one class each. To add a codec, add its line in :data:`CODECS`. Those of
:mod:`.kvtc` have a basis, named by its digest: ``kvtc16:0123456789abcdef``."""

from __future__ import annotations

from functools import lru_cache

from ragcache.errors import ConfigError
from ragcache.store.format.codecs.base import Codec, LayerCodec
from ragcache.store.format.codecs.basis import Basis, find_basis
from ragcache.store.format.codecs.cachegen import CacheGen
from ragcache.store.format.codecs.cast import Cast
from ragcache.store.format.codecs.fp8 import Fp8
from ragcache.store.format.codecs.int8 import Int8
from ragcache.store.format.codecs.kvtc import KVTC, LEVELS
from ragcache.store.format.codecs.raw import Raw
from ragcache.types import KVSpec

__all__ = ["CODECS", "Codec", "codec", "expected_bytes", "find_codec"]

CODECS: dict[str, LayerCodec] = {
    "raw": Raw(),
    "bfloat16": Cast("bfloat16"),
    "float16": Cast("float16"),
    "int8": Int8(),
    "fp8": Fp8(),
    "cachegen": CacheGen(),
}

_CACHEGEN_BYTES = 0.262  # per number, measured for a large model: docs/codecs.md


def codec(name: str) -> Codec:
    """The codec called ``name``. Raises ConfigError if there is none, a package is missing, or its
    basis is not here."""
    found = find_codec(name)
    if isinstance(found, str):
        raise ConfigError(found)
    found.check()
    return found


def is_codec(name: str) -> bool:
    """Whether there is a codec called ``name``, with or without its basis."""
    return name in CODECS or name.partition(":")[0] in LEVELS


def find_codec(name: str) -> Codec | str:
    """The codec called ``name``, or why there is none, in words."""
    if name in CODECS:
        return CODECS[name]
    level, _, digest = name.partition(":")
    if level not in LEVELS:
        return f"codec {name!r} is unknown: use one of {', '.join((*CODECS, *LEVELS))}"
    if not digest:
        return f"codec {name} needs a basis, which `ragcache index --codec {name}` makes"
    found = find_basis(digest)
    if isinstance(found, str):
        return f"the basis of codec {name} is missing: {found}"
    if LEVELS[level] not in found.steps:
        return f"the basis of codec {name} has no such level"
    return _kvtc(found, LEVELS[level])


def expected_bytes(name: str, spec: KVSpec, tokens: int) -> float:
    """Bytes of a chunk in the codec ``name``, which may lack its basis: an estimate where they
    depend on the values. Raises ConfigError for an unknown codec."""
    numbers = spec.chunk_bytes(tokens) / spec.itemsize
    level = LEVELS.get(name.partition(":")[0])
    if level is not None:
        return numbers * 2 / level
    coded = codec(name)
    layer = coded.layer_bytes(spec, tokens)
    return numbers * _CACHEGEN_BYTES if layer is None else spec.layers * layer


@lru_cache(maxsize=16)
def _kvtc(found: Basis, level: int) -> KVTC:
    return KVTC(found, level)
