"""KVShare: recompute tokens that deviate and receive attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

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
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall, AttentionRule

_QUERIES = 256  # rows whose attention is summed at a time


@dataclass(frozen=True)
class KVShare(RatioBlender):
    """Recompute the tokens with the largest product of attention received and value deviation.

    The prefill stage of DHD of Yang et al., arXiv:2503.16525. The first layers are computed in
    full up to ``check_layer``; there a token's score is the attention that it receives from all
    rows and heads, times the L1 norm of the difference of its fresh and stored values. The
    ``recompute_ratio`` of the chunk tokens (0.1 to 0.4 in the paper) with the highest score is
    computed at all further layers. The paper's second stage, which recomputes while decoding, is
    not implemented.
    """

    check_layer: int = 1
    name: ClassVar[str] = "kvshare"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.check_layer, "check_layer")

    @property
    def full_layers(self) -> int:
        return self.check_layer + 1

    def selector(self, layout: Layout, layers: int) -> Selector:
        check_depth(self.name, self.check_layer, layers)
        if self.recompute_ratio == 0:
            return FixedRows(layout.reusable[:0])
        return _Attended(layout, int(self.recompute_ratio * len(layout.reusable)), self.check_layer)


@dataclass
class _Attended(Selector):
    layout: Layout
    count: int
    check_layer: int
    _received: Tensor = field(init=False)  # (reusable,)

    @property
    def attend(self) -> AttentionRule:
        return self._see

    def first(self) -> Tensor:
        return self.layout.reusable

    def loads(self, layer: int) -> bool:
        return layer >= self.check_layer

    def narrows(self, layer: int) -> bool:
        return layer == self.check_layer

    compares = narrows

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        assert fresh is not None and stored is not None
        error = (fresh[1].float() - stored[1].float()).abs().sum((0, 2))
        return highest(rows, self._received.to(error.device) * error, self.count)

    def _see(self, call: AttentionCall) -> None:
        if call.layer != self.check_layer:
            return
        received = torch.zeros(call.keys.shape[1], device=call.keys.device)
        for start in range(0, len(call.rows), _QUERIES):
            received += call.softmax(call.scores(slice(start, start + _QUERIES))).sum((0, 1))
        self._received = received[self.layout.reusable.to(received.device)]
