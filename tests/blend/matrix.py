"""Every fusion method and variant that the shared tests run: add a method by adding its line."""

from __future__ import annotations

from ragcache.blend import Blender
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.full import Full
from ragcache.blend.prefix import Prefix
from ragcache.blend.random import Random
from ragcache.blend.reuse import Reuse

#: The method with nothing recomputed where it has a ratio: must equal naive reuse.
AT_ZERO: list[Blender] = [
    Reuse(),
    CacheBlend(0.0),
    Random(0.0),
]

#: The method with everything recomputed: must equal full prefill.
AT_ONE: list[Blender] = [
    Full(),
    Prefix(),
    CacheBlend(1.0),
    CacheBlend(1.0, deviation="k"),
    CacheBlend(1.0, deviation="kv", gradual=True),
    CacheBlend(1.0, check_layer=2),
    Random(1.0),
    Random(1.0, full_layers=2),
]

#: The method in between.
PARTIAL: list[Blender] = [
    Reuse(),
    Reuse("overlapping"),
    CacheBlend(0.3),
    CacheBlend(0.3, deviation="k"),
    CacheBlend(0.3, deviation="kv"),
    CacheBlend(0.3, gradual=True),
    Random(0.3),
    Random(0.3, full_layers=2),
]


def label(blender: Blender) -> str:
    """A readable test id."""
    parameters = ",".join(f"{k}={v}" for k, v in blender.parameters.items())
    return f"{blender.name}({parameters})"
