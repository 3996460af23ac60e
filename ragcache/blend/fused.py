"""Fused, the default: recompute the tokens that depend most on the context of their chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.ranking import highest


@dataclass(frozen=True)
class Fused(RatioBlender):
    """Recompute, at all layers, the ``recompute_ratio`` of all tokens with the largest sensitivity.

    Sensitivity is stored with every chunk (see :mod:`ragcache.core.sensitivity`), so no probe and
    no full layer is needed to choose. The measurements behind this rule are in
    docs/choosing-tokens.md; there is no paper.
    """

    name: ClassVar[str] = "fused"

    @property
    def by_sensitivity(self) -> bool:
        return True

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _MostSensitive(layout, int(self.recompute_ratio * len(layout.reusable)))


@dataclass
class _MostSensitive(Selector):
    layout: Layout
    count: int

    def first(self) -> Tensor:
        return highest(self.layout.reusable, self.layout.sensitivity, self.count)
