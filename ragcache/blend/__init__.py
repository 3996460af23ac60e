"""Fusion methods: one file, one frozen dataclass each. Add a method by adding its line here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ragcache.blend.base import Blender
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.full import Full
from ragcache.blend.prefix import Prefix
from ragcache.blend.random import Random
from ragcache.blend.reuse import Reuse
from ragcache.errors import ConfigError

__all__ = ["BLENDERS", "Blender", "CacheBlend", "Full", "Prefix", "Random", "Reuse", "blender"]

BLENDERS: dict[str, type[Blender]] = {
    "full": Full,
    "prefix": Prefix,
    "reuse": Reuse,
    "cacheblend": CacheBlend,
    "random": Random,
}


def blender(mode: str | Blender, ratio: float | None = None) -> Blender:
    """A blender from its name and parameters: ``cacheblend`` or ``cacheblend:deviation=kv,...``.

    ``ratio`` sets ``recompute_ratio``. Raises ConfigError for an unknown mode or parameter, or
    a ratio that the mode does not take.
    """
    if isinstance(mode, Blender):
        if ratio is not None:
            raise ConfigError("give a ratio or a finished blender, not both")
        return mode
    name, _, rest = mode.partition(":")
    if name not in BLENDERS:
        raise ConfigError(f"mode {name!r} is unknown: use one of {', '.join(BLENDERS)}")
    cls = BLENDERS[name]
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, text = pair.partition("=")
        given[key.strip()] = text.strip()
    if ratio is not None:
        given["recompute_ratio"] = ratio
    known = {f.name: f.default for f in fields(cls)}
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "nothing"
            raise ConfigError(f"mode {name!r} has no parameter {key!r}: it takes {takes}")
        given[key] = _typed(key, value, known[key])
    return cls(**given)


def _typed(key: str, value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``, or ConfigError."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        return type(default)(value)
    except (KeyError, ValueError) as error:
        kind = type(default).__name__
        raise ConfigError(f"{key}={value!r} cannot be read as {kind}") from error
