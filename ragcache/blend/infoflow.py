"""InfoFlow-KV: recompute the tokens from which information flows to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.ranking import Band, QuestionAttention, band, norm


@dataclass(frozen=True)
class InfoFlow(RatioBlender):
    """Recompute the tokens with the largest norm of the question's attention, at all layers.

    arXiv:2603.05353. A probe first runs the question over the stored KV, with the positions of the
    prompt. A token's score is sqrt(sum_q (mean_h a_hq)^2) over question tokens q and heads h,
    summed over a band of layers: ``all``, or the ``first``, ``middle`` or ``last`` third.
    """

    layers: Band = "middle"
    name: ClassVar[str] = "infoflow"

    def __post_init__(self) -> None:
        super().__post_init__()
        band(self.layers, 1)

    def selector(self, layout: Layout, layers: int) -> Selector:
        count = int(self.recompute_ratio * len(layout.reusable))
        return QuestionAttention(layout, count, band(self.layers, layers), norm)
