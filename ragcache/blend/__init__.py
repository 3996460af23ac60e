"""Fusion methods, one file and one frozen dataclass each. Register a new one in ``BLENDERS``."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ragcache.blend.ape import APE
from ragcache.blend.base import Blender
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.epic import Epic
from ragcache.blend.full import Full
from ragcache.blend.full_layers import WithFullLayers
from ragcache.blend.fused import Fused
from ragcache.blend.infoflow import InfoFlow
from ragcache.blend.kvshare import KVShare
from ragcache.blend.prefix import Prefix
from ragcache.blend.prophet import Prophet
from ragcache.blend.qcfuse import QCFuse
from ragcache.blend.random import Random
from ragcache.blend.reuse import Reuse
from ragcache.errors import ConfigError

__all__ = ["BLENDERS", "Blender", "blender", "with_ratio", "written"]

BLENDERS: dict[str, type[Blender]] = {
    "full": Full,
    "prefix": Prefix,
    "reuse": Reuse,
    "fused": Fused,
    "cacheblend": CacheBlend,
    "prophet": Prophet,
    "infoflow": InfoFlow,
    "qcfuse": QCFuse,
    "kvshare": KVShare,
    "epic": Epic,
    "cachecraft": CacheCraft,
    "ape": APE,
    "random": Random,
}


def blender(mode: str | Blender, ratio: float | None = None) -> Blender:
    """A blender from its name and parameters.

    ``cacheblend``, ``cacheblend:deviation=kv,gradual=true`` or ``random+full_layers=2``; ``ratio``
    sets ``recompute_ratio``. Raises ConfigError for an unknown mode or parameter, or a ratio that
    the mode does not take.
    """
    if isinstance(mode, Blender):
        if ratio is not None:
            raise ConfigError("give a ratio or a finished blender, not both")
        return mode
    method, *additions = mode.split("+")
    name, _, rest = method.partition(":")
    if name not in BLENDERS:
        raise ConfigError(f"mode {name!r} is unknown: use one of {', '.join(BLENDERS)}")
    cls = BLENDERS[name]
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, text = pair.partition("=")
        given[key.strip()] = text.strip()
    known = {f.name: f.default for f in fields(cls)}
    if ratio is not None:
        if "recompute_ratio" not in known:
            raise ConfigError(f"mode {name!r} takes no ratio: leave it out, or use mode fused")
        given["recompute_ratio"] = ratio
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "nothing"
            raise ConfigError(f"mode {name!r} has no parameter {key!r}: it takes {takes}")
        given[key] = _typed(key, value, known[key])
    made: Blender = cls(**given)
    for text in additions:
        name, _, number = text.partition("=")
        if name != "full_layers":
            raise ConfigError(f"{text!r} cannot be added to a mode: only full_layers=N can")
        made = WithFullLayers(made, _typed(name, number, 1))
    return made


def written(made: Blender) -> str:
    """The text from which :func:`blender` makes ``made``."""
    if isinstance(made, WithFullLayers):
        return f"{written(made.inner)}+full_layers={made.layers}"
    parameters = ",".join(f"{key}={value}" for key, value in made.parameters.items())
    return f"{made.name}:{parameters}" if parameters else made.name


def with_ratio(made: Blender, ratio: float) -> Blender:
    """A copy of ``made``, which takes a ratio, with ``recompute_ratio`` set to ``ratio``."""
    if isinstance(made, WithFullLayers):
        return replace(made, inner=with_ratio(made.inner, ratio))
    changes: Any = {"recompute_ratio": ratio}
    return replace(made, **changes)


def _typed(key: str, value: Any, default: Any) -> Any:
    """``value`` converted to the type of ``default``; ConfigError if that fails."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        return type(default)(value)
    except (KeyError, ValueError, OverflowError) as error:
        kind = type(default).__name__
        raise ConfigError(
            f"{key}={value!r} cannot be read as {kind}: give one such as {key}={default}"
        ) from error
