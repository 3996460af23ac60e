"""Rank rows by a score and take the highest; scores from the question's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ragcache.blend.base import Layout, Probe, Selector
from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall

__all__ = ["band"]


def highest(rows: Tensor, scores: Tensor, count: int) -> Tensor:
    """The ``count`` of ``rows`` with the highest ``scores``, both (n,); the result is sorted.

    Among equal scores the first rows are taken. Scores that are not finite: see :func:`_finite`.
    """
    order = _finite(scores.double().cpu()).sort(descending=True, stable=True).indices
    return rows[order[:count].sort().values]


def _finite(scores: Tensor) -> Tensor:
    """``scores`` with infinity replaced by the largest finite score, and NaN and minus infinity by
    the smallest; all 0 if none is finite."""
    sound = scores[scores.isfinite()]
    if len(sound) == len(scores):
        return scores
    low, high = (float(sound.min()), float(sound.max())) if len(sound) else (0.0, 0.0)
    return scores.nan_to_num(nan=low, posinf=high, neginf=low)


#: Attention weights of the question, (heads, question, reusable), to one score per reusable row.
_Reduce = Callable[[Tensor], Tensor]


@dataclass
class QuestionAttention(Selector):
    """Chooses the ``count`` rows that the question attends to most, in a probe over the stored KV.

    ``reduce`` turns attention weights into scores, which are summed over ``layers``; the probe ends
    after the last of them. In the probe, the question sees of every chunk the first ``sinks`` rows
    and a share ``anchors`` of all rows: at each layer those whose keys have the smallest norm,
    which tend to receive most attention (Devoto et al., EMNLP 2024, arXiv:2406.11430). Hidden rows
    are scored too. If ``anchors`` is 1, no row is hidden.
    """

    layout: Layout
    count: int
    layers: range
    reduce: _Reduce
    anchors: float = 1.0
    sinks: int = 0
    scores: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scores = torch.zeros(len(self.layout.reusable))

    @property
    def probe(self) -> Probe | None:
        return Probe(self.layers.stop, self._see) if self.count else None

    def first(self) -> Tensor:
        return highest(self.layout.reusable, self.scores, self.count)

    @cached_property
    def _places(self) -> Tensor:
        """Those of the reusable rows among the keys of the probe."""
        return self.layout.in_probe(self.layout.reusable)

    def _see(self, call: AttentionCall) -> Tensor | None:
        everything, asking = self.anchors == 1, slice(-self.layout.asked, None)
        if everything and call.layer not in self.layers:
            return None
        scores = call.scores(asking if everything else slice(None))
        reusable = self._places.to(scores.device)
        if call.layer in self.layers:
            weights = call.softmax(scores[:, asking])
            self.scores += self.reduce(weights.index_select(2, reusable)).cpu()
        if everything:
            return None  # the model's own attention
        hidden = reusable[~self._shown(call.keys.index_select(1, reusable)).to(reusable.device)]
        scores[:, asking].index_fill_(2, hidden, float("-inf"))
        return call.attend(call.softmax(scores))

    def _shown(self, keys: Tensor) -> Tensor:
        """Whether the question sees each reusable row, (reusable,) bool; ``keys`` (kv_heads,
        reusable, head_dim)."""
        norms = keys.float().norm(dim=2).mean(0).cpu()
        chunk = self.layout.chunk_of
        counts = torch.bincount(chunk)
        order = norms.argsort()
        order = order[chunk[order].argsort(stable=True)]  # chunk by chunk, the smallest first
        rank = torch.arange(len(chunk)) - (counts.cumsum(0) - counts)[chunk]
        shown = self.layout.place_in_chunk < self.sinks
        shown[order] |= rank < (self.anchors * counts).round()[chunk]
        return shown


def mean(weights: Tensor) -> Tensor:
    """Mean over heads and question tokens."""
    return weights.mean((0, 1))


def peak(weights: Tensor) -> Tensor:
    """Maximum over heads and question tokens."""
    return weights.amax((0, 1))


def norm(weights: Tensor) -> Tensor:
    """Mean over heads, then the L2 norm over question tokens."""
    return weights.mean(0).square().sum(0).sqrt()


Band = Literal["all", "first", "middle", "last"]


def band(name: Band, layers: int) -> range:
    """All layers, or the first, middle or last third. Raises ConfigError for another name."""
    if name not in get_args(Band):
        known = ", ".join(get_args(Band))
        raise ConfigError(f"layers is {name!r}: it must be one of {known}")
    third = -(-layers // 3)
    start = {"all": 0, "first": 0, "middle": (layers - third) // 2, "last": layers - third}[name]
    return range(start, layers if name == "all" else start + third)
