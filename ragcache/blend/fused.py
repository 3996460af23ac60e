"""Our own: recompute what the question attends to and what is wrong, where it still can matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, KVPair, Layout, Selector, check_least, check_ratio
from ragcache.blend.cacheblend import deviation
from ragcache.blend.rank import Band, QuestionAttention, band, mean


@dataclass(frozen=True)
class Fused(Blender):
    """Recompute the tokens with the largest product of question attention and value error.

    To first order, the change of an attention output is attention times the error of what is
    attended to. The attention a of a token comes from a probe, the question over the stale KV
    (mean over question tokens, heads and ``layers``; of every chunk the question sees the share
    ``anchors``, see QuestionAttention). The most attended tokens start out; from layer 1 on, the
    error e of each is known at every layer, the squared difference of its fresh and stored values,
    and those with the largest a^p * e^q go on, p ``attention_power`` and q ``error_power``. No
    other row need be computed for that: keys and values of layer 0 are exact in any store.

    The share of tokens computed at layer l of L is proportional to (1 - l / (L - 1))^``taper``,
    and its mean over the layers is ``recompute_ratio``: what a chunk lacks is mostly put right by
    the time that its tokens have read their new context. A ``taper`` of 0 keeps all to the end.
    """

    recompute_ratio: float = 0.12
    taper: float = 2.0
    attention_power: float = 0.5
    error_power: float = 0.5
    layers: Band = "all"
    anchors: float = 0.15
    name: ClassVar[str] = "fused"

    def __post_init__(self) -> None:
        for what in ("recompute_ratio", "anchors"):
            check_ratio(getattr(self, what), what)
        for what in ("taper", "attention_power", "error_power"):
            check_least(getattr(self, what), what)
        band(self.layers, 1)

    def selector(self, layout: Layout, layers: int) -> Selector:
        shares = _tapered(self.recompute_ratio, layers, self.taper)
        counts = [int(share * len(layout.reusable)) for share in shares]
        looked_at = band(self.layers, layers)
        return _AttendedError(
            layout, counts[0], looked_at, mean, self.anchors, counts=counts, given=self
        )


def _tapered(ratio: float, layers: int, taper: float) -> list[float]:
    """A share per layer, none above 1, their mean ``ratio``; a wide ratio tapers less."""
    left = [(1 - layer / max(1, layers - 1)) ** taper for layer in range(layers)]
    excess = [ratio * (weight / fmean(left) - 1) for weight in left]
    fits = min(1.0, (1 - ratio) / max(*excess, 1e-9))
    return [ratio + fits * more for more in excess]


@dataclass
class _AttendedError(QuestionAttention):
    counts: list[int] = field(kw_only=True)  # of rows to compute, per layer
    given: Fused = field(kw_only=True)

    def compares(self, layer: int) -> bool:
        return 0 < layer < len(self.counts) - 1

    def narrow(self, layer: int, rows: Tensor, fresh: KVPair, stored: KVPair) -> Tensor:
        count = self.counts[layer + 1]
        if count >= len(rows):
            return rows
        attention = self.scores[torch.searchsorted(self.layout.reusable, rows)]
        error = deviation("v", fresh, stored).cpu()
        scores = attention**self.given.attention_power * error**self.given.error_power
        return self.best(rows, scores, count)
