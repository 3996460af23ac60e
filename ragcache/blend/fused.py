"""Our own: recompute what the question attends to and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, KVPair, Layout, Selector, check_depth, check_ratio
from ragcache.blend.cacheblend import deviation
from ragcache.blend.rank import POOLS, Band, Pool, QuestionAttention, band
from ragcache.blend.shape import Successors
from ragcache.errors import ConfigError


@dataclass(frozen=True)
class Fused(Blender):
    """Recompute the tokens with the largest product of question attention and value error.

    The change of an attention output is, to first order, attention times the error of what is
    attended to. The attention a comes from a probe, the question over the stale KV (mean over
    question tokens, heads and ``layers``). ``candidates`` times as many tokens as
    ``recompute_ratio`` asks for start out, the most attended ones; at ``check_layer`` each is
    known by its error e, the squared difference of fresh and stored values (no other row need be
    computed for that: keys and values of layer 0 are exact in any store), and the ratio goes on
    with the largest a^p * e^q, p ``attention_power`` and q ``error_power``. Every token shares
    its score with the ``successors`` tokens behind it. A ``candidates`` of 1 ranks by attention
    alone.
    """

    recompute_ratio: float = 0.1
    candidates: float = 2.0
    attention_power: float = 0.5
    error_power: float = 0.5
    successors: int = 1
    layers: Band = "all"
    pool: Pool = "mean"
    anchors: float = 1.0
    check_layer: int = 1
    name: ClassVar[str] = "fused"

    def __post_init__(self) -> None:
        check_ratio(self.recompute_ratio)
        check_ratio(self.anchors, "anchors")
        band(self.layers, 1)
        if self.pool not in POOLS:
            raise ConfigError(f"pool is {self.pool!r}: it must be one of {', '.join(POOLS)}")
        if self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates}: it must be 1 or more")
        for what in ("attention_power", "error_power", "successors", "check_layer"):
            if getattr(self, what) < 0:
                raise ConfigError(f"{what} is {getattr(self, what)}: it must be 0 or more")

    def selector(self, layout: Layout, layers: int) -> Selector:
        if self.candidates > 1:
            check_depth(self.name, self.check_layer, layers)
        count = int(self.recompute_ratio * len(layout.reusable))
        selector = _AttendedError(
            layout, count, band(self.layers, layers), POOLS[self.pool], self.anchors, given=self
        )
        if self.successors:
            selector.shapes = (Successors(self.successors),)
        return selector


@dataclass
class _AttendedError(QuestionAttention):
    given: Fused = field(kw_only=True)

    def first(self) -> Tensor:
        rows = self.layout.reusable
        return self.best(rows, self.scores, round(self.given.candidates * self.count))

    def compares(self, layer: int) -> bool:
        return self.given.candidates > 1 and layer == self.given.check_layer

    def narrow(self, layer: int, rows: Tensor, fresh: KVPair, stored: KVPair) -> Tensor:
        attention = self.scores[torch.searchsorted(self.layout.reusable, rows)]
        error = deviation("v", fresh, stored).cpu()
        scores = attention**self.given.attention_power * error**self.given.error_power
        return self.best(rows, scores, self.count)
