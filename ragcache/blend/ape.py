"""APE: parallel encoding with the attention to the chunks rescaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, Positions, Selector
from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall, AttentionRule

__all__ = ["APE"]


@dataclass(frozen=True)
class APE(Blender):
    """Place every chunk right after the prefix and rescale the attention to the chunks.

    Yang et al., ICLR 2025, arXiv:2502.05431. Nothing is recomputed. For the question and every
    generated token, scores over chunk keys are divided by ``temperature`` T; with l the
    log-sum-exp of those, the chunks together weigh S * T * l against the log-sum-exp of all
    other keys, where S is ``scale``. Merged in float32. T = S = 1 is plain parallel encoding,
    ``reuse:positions=overlapping``. The defaults are the authors'; they search both per model.
    """

    temperature: float = 0.9
    scale: float = 0.9
    name: ClassVar[str] = "ape"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("temperature", "scale"):
            if not 0 < getattr(self, what) <= 2:
                raise ConfigError(f"{what} is {getattr(self, what)}: it must be in (0, 2]")

    @property
    def placement(self) -> Positions:
        return "overlapping"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _Tempered(layout, self.temperature, self.scale)


@dataclass
class _Tempered(Selector):
    layout: Layout
    temperature: float
    scale: float

    @property
    def attend(self) -> AttentionRule:
        return self._attend

    @property
    def lasting(self) -> bool:
        return True

    def first(self) -> Tensor:
        return self.layout.reusable[:0]

    def _attend(self, call: AttentionCall) -> Tensor:
        scores = call.scores()
        chunks = self.layout.reusable.to(scores.device)
        tempered = scores.index_select(2, chunks) / self.temperature
        together = tempered.logsumexp(2, keepdim=True)
        weight = (self.scale * self.temperature - 1) * together
        weight = torch.where(together.isfinite(), weight, 0)  # 0 for a row that sees no chunk
        return call.attend(call.softmax(scores.index_copy(2, chunks, tempered + weight)))
