"""Random selection: the control that every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, Selector, check_ratio
from ragcache.blend.ranking import highest


@dataclass(frozen=True)
class Random(Blender):
    """Recompute a random ``recompute_ratio`` of the chunk tokens.

    ``random+full_layers=2`` has the charged budget of a selector that spends its first layers on
    looking, as CacheBlend does.
    """

    recompute_ratio: float = 0.15
    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.recompute_ratio)

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
