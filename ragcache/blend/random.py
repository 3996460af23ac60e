"""Random selection: the control for every selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.ranking import highest


@dataclass(frozen=True)
class Random(RatioBlender):
    """Recompute a random ``recompute_ratio`` of the chunk tokens.

    ``random+full_layers=2`` has the charged budget of a method that computes its first layers in
    full, as CacheBlend does.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    @property
    def keeps_rows(self) -> bool:
        return True

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _Shuffled(layout, int(self.recompute_ratio * len(layout.reusable)), self.seed)


@dataclass
class _Shuffled(Selector):
    layout: Layout
    count: int
    seed: int

    def first(self) -> Tensor:
        rows = self.layout.reusable
        scores = torch.rand(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return highest(rows, scores, self.count)
