"""ProphetKV: recompute the tokens that the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.ranking import QuestionAttention, mean


@dataclass(frozen=True)
class Prophet(RatioBlender):
    """Recompute the tokens that the question attends to most, at all layers.

    Wang et al., ICML 2026, arXiv:2602.02579. A probe first runs the question over the stored KV;
    a token's score is its attention weight, averaged over question tokens, heads and layers. The
    ``recompute_ratio`` of the chunk tokens with the highest score is computed.
    """

    recompute_ratio: float = 0.2
    name: ClassVar[str] = "prophet"

    def selector(self, layout: Layout, layers: int) -> Selector:
        count = int(self.recompute_ratio * len(layout.reusable))
        return QuestionAttention(layout, count, range(layers), mean)
