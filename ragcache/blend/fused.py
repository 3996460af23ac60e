"""Fused, the default method: recompute the tokens that depend most on the text before their chunk,
and those whose error the question would notice most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Layout, RatioBlender, Selector, check_ratio
from ragcache.blend.ranking import QuestionAttention, highest, peak


@dataclass(frozen=True)
class Fused(RatioBlender):
    """Recompute the ``recompute_ratio`` of all tokens at all layers, chosen in two ways.

    The share ``1 - attention`` of them has the largest sensitivity u, the squared relative change
    of a token's values behind other text, which is stored with every chunk (see
    :mod:`ragcache.core.sensitivity`). The others have the largest

        sqrt(u) * sum over layers of max over heads and question tokens of the attention weight,

    to first order what their error does to the question. The weights are seen in a probe of the
    question over the stored KV. Where that would compute more of the question's rows than it
    chooses, all rows are chosen by sensitivity. This method is ragcache's own, without a paper;
    docs/choosing-tokens.md has the measurements that it is based on.
    """

    attention: float = 0.5
    name: ClassVar[str] = "fused"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.attention, "attention")

    @property
    def by_sensitivity(self) -> bool:
        return True

    @property
    def keeps_rows(self) -> bool:
        return True

    @property
    def without_attention(self) -> Fused:
        return replace(self, attention=0.0)

    def selector(self, layout: Layout, layers: int) -> Selector:
        count = int(self.recompute_ratio * len(layout.reusable))
        attended = int(self.attention * count)
        if count == len(layout.reusable) or attended < layout.asked:
            attended = 0
        return _SensitiveAndAttended(
            layout, attended, range(layers), peak, sensitive=count - attended
        )


@dataclass
class _SensitiveAndAttended(QuestionAttention):
    """Chooses ``sensitive`` rows by sensitivity, and ``count`` of the others by attention too."""

    sensitive: int = field(kw_only=True)

    def first(self) -> Tensor:
        rows, known = self.layout.reusable, self.layout.sensitivity
        chosen = highest(rows, known, self.sensitive)
        left = ~torch.isin(rows, chosen)
        scores = self.scores[left] * known[left].clamp_min(0).sqrt()
        return torch.cat([chosen, highest(rows[left], scores, self.count)]).sort().values
