"""Fused, the default method: recompute the tokens that depend most on what precedes their chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.ranking import highest


@dataclass(frozen=True)
class Fused(RatioBlender):
    """Recompute, at all layers, the ``recompute_ratio`` of all tokens with the largest sensitivity.

    Sensitivity is stored with every chunk (see :mod:`ragcache.core.sensitivity`), so neither a
    probe nor a full layer is needed to choose the tokens. This method is ragcache's own, without a
    paper; docs/choosing-tokens.md has the measurements that it is based on.
    """

    name: ClassVar[str] = "fused"

    @property
    def by_sensitivity(self) -> bool:
        return True

    @property
    def keeps_rows(self) -> bool:
        return True

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _MostSensitive(layout, int(self.recompute_ratio * len(layout.reusable)))


@dataclass
class _MostSensitive(Selector):
    layout: Layout
    count: int

    def first(self) -> Tensor:
        return highest(self.layout.reusable, self.layout.sensitivity, self.count)
