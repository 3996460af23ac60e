"""Every fusion method and variant that the shared tests run. Add a line for a new method."""

from __future__ import annotations

from ragcache.blend import Blender, blender
from ragcache.blend.ape import APE
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.epic import Epic
from ragcache.blend.full import Full
from ragcache.blend.fused import Fused
from ragcache.blend.infoflow import InfoFlow
from ragcache.blend.kvshare import KVShare
from ragcache.blend.prefix import Prefix
from ragcache.blend.prophet import Prophet
from ragcache.blend.qcfuse import QCFuse
from ragcache.blend.random import Random
from ragcache.blend.reuse import Reuse
from ragcache.testing.blender import label

__all__ = ["AT_ONE", "AT_ZERO", "PARTIAL", "label"]

#: The method with nothing recomputed where it has a ratio: must equal naive reuse.
AT_ZERO: list[Blender] = [
    Reuse(),
    CacheBlend(0.0),
    Random(0.0),
    KVShare(0.0),
    Prophet(0.0),
    InfoFlow(0.0),
    QCFuse(0.0),
    Fused(0.0),
    Epic(0),
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
    Prophet(1.0),
    InfoFlow(1.0),
    QCFuse(1.0),
    KVShare(1.0),
    Epic(512),
    CacheCraft(alpha=2, focus=False),
    Fused(1.0),
    blender("random+full_layers=2", 1.0),
    blender("cacheblend:gradual=true+full_layers=3", 1.0),
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
    Fused(0.3, attention=0),
    Prophet(0.3),
    InfoFlow(0.3),
    InfoFlow(0.3, layers="last"),
    QCFuse(0.3),
    KVShare(0.3),
    Epic(3),
    CacheCraft(alpha=0.6, focus=False),
    CacheCraft(alpha=0.6, patience=1),
    APE(),
    Fused(0.3),
    blender("random+full_layers=2", 0.3),
    blender("prophet+full_layers=1", 0.3),
    blender("cacheblend:gradual=true+full_layers=3", 0.3),
]
