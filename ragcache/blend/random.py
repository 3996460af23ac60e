"""Random selection: the control that every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, KVPair, Layout, Selector, check_ratio
from ragcache.errors import ConfigError


@dataclass(frozen=True)
class Random(Blender):
    """Recompute a random ``recompute_ratio`` of the chunk tokens.

    ``full_layers`` first layers are computed in full, which gives this control the same charged
    budget as a selector that spends its early layers on looking (CacheBlend's two).
    """

    recompute_ratio: float = 0.15
    full_layers: int = 0
    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_ratio(self.recompute_ratio)
        if self.full_layers < 0:
            raise ConfigError(f"full_layers is {self.full_layers}: it must be 0 or more")

    def selector(self, layout: Layout, layers: int) -> Selector:
        generator = torch.Generator().manual_seed(self.seed)
        rows = layout.reusable
        order = torch.randperm(len(rows), generator=generator)
        chosen = rows[order[: int(self.recompute_ratio * len(rows))]].sort().values
        return _AfterFullLayers(rows, chosen, self.full_layers)


@dataclass(frozen=True)
class _AfterFullLayers(Selector):
    every: Tensor
    chosen: Tensor
    full_layers: int

    def first(self) -> Tensor:
        return self.every if self.full_layers else self.chosen

    def compares(self, layer: int) -> bool:
        return layer == self.full_layers - 1

    def narrow(self, rows: Tensor, fresh: KVPair, stored: KVPair) -> Tensor:
        return self.chosen
