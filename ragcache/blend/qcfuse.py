"""QCFuse: probe the question over a few anchor tokens of every chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Layout, RatioBlender, Selector, check_least, check_ratio
from ragcache.blend.ranking import QuestionAttention, mean


@dataclass(frozen=True)
class QCFuse(RatioBlender):
    """Recompute the tokens that the question attends to after it has seen only the chunks' anchors.

    Yan et al., arXiv:2606.05875. In the probe, the question sees of each chunk the first ``sinks``
    tokens and a share ``anchors`` of all tokens. A token's score is its attention weight among all
    tokens, averaged over question tokens, heads and ``critical_layers`` layers. The
    ``recompute_ratio`` of the tokens with the highest score is computed at all layers.

    The paper scores anchors and profiles layers offline. Here the anchors of a layer are the
    tokens whose keys have the smallest norm (see :class:`QuestionAttention`), and the critical
    layers are those in the middle.
    """

    anchors: float = 0.15
    sinks: int = 4
    critical_layers: int = 3
    name: ClassVar[str] = "qcfuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.anchors, "anchors")
        check_least(self.sinks, "sinks")
        check_least(self.critical_layers, "critical_layers", 1)

    def selector(self, layout: Layout, layers: int) -> Selector:
        count = int(self.recompute_ratio * len(layout.reusable))
        few = min(self.critical_layers, layers)
        start = (layers - few) // 2
        critical = range(start, start + few)
        return QuestionAttention(layout, count, critical, mean, self.anchors, self.sinks)
