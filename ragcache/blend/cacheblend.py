"""CacheBlend: recompute the tokens whose KV deviates most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ragcache.blend.base import (
    FixedRows,
    Layout,
    RatioBlender,
    Selector,
    check_depth,
    check_least,
)
from ragcache.blend.ranking import highest
from ragcache.errors import ConfigError
from ragcache.types import KVPair

_Deviation = Literal["v", "k", "kv"]


@dataclass(frozen=True)
class CacheBlend(RatioBlender):
    """Recompute the tokens whose KV deviates most from full prefill.

    Yao et al., EuroSys 2025, arXiv:2405.16444. The first layers are computed in full up to
    ``check_layer``; there the deviation of a token is the squared difference of its fresh and
    stored KV, summed over heads and dimensions. The ``recompute_ratio`` of the chunk tokens with
    the highest deviation is computed at all further layers.

    ``deviation``: of values (``v``, the released code), keys (``k``, LMCache) or both (``kv``,
    the paper). ``gradual``: the paper's gradual filtering, which keeps a little more than the
    ratio at the check layer and drops the least deviating survivors at every layer after it, so
    that the mean over those layers is the ratio; ``False`` is the single cut of the released
    code. Needs more layers than ``check_layer`` + 1.
    """

    deviation: _Deviation = "v"
    gradual: bool = False
    check_layer: int = 1
    name: ClassVar[str] = "cacheblend"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deviation not in get_args(_Deviation):
            known = ", ".join(get_args(_Deviation))
            raise ConfigError(f"deviation is {self.deviation!r}: it must be one of {known}")
        check_least(self.check_layer, "check_layer")

    @property
    def full_layers(self) -> int:
        return self.check_layer + 1

    def selector(self, layout: Layout, layers: int) -> Selector:
        check_depth(self.name, self.check_layer, layers)
        if self.recompute_ratio == 0:  # no row will be chosen, so none has to be compared
            return FixedRows(layout.reusable[:0])
        after = layers - self.check_layer - 1
        ratios = _gradual(self.recompute_ratio, after) if self.gradual else [self.recompute_ratio]
        counts = [int(r * len(layout.reusable)) for r in ratios]
        return _MostDeviating(layout, counts, self.check_layer, self.deviation)


def _gradual(ratio: float, layers: int) -> list[float]:
    """Ratios falling in equal steps over ``layers``, their mean ``ratio``, none above 1."""
    spread = min(ratio / 2, 1 - ratio)
    steps = torch.linspace(spread, -spread, layers, dtype=torch.float64)
    return [ratio + float(s) for s in steps]


@dataclass
class _MostDeviating(Selector):
    """Keeps ``counts[i]`` rows at the i-th comparison; counts never grow."""

    layout: Layout
    counts: list[int]
    check_layer: int
    deviation: _Deviation

    def first(self) -> Tensor:
        return self.layout.reusable

    def loads(self, layer: int) -> bool:
        return layer >= self.check_layer

    def narrows(self, layer: int) -> bool:
        return 0 <= layer - self.check_layer < len(self.counts)

    compares = narrows

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        assert fresh is not None and stored is not None
        scores = deviation(self.deviation, fresh, stored)
        return highest(rows, scores, self.counts[layer - self.check_layer])


def deviation(of: _Deviation, fresh: KVPair, stored: KVPair) -> Tensor:
    """Squared difference of keys, values or both, summed over heads and dimensions: (rows,)."""
    return torch.stack(
        [
            (new.float() - old.float()).square().sum((0, 2))
            for which, new, old in zip("kv", fresh, stored, strict=True)
            if which in of
        ]
    ).sum(0)
