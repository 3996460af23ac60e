"""How much a chunk attends to itself and to its context, recorded while it is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragcache.blend.base import Layout
from ragcache.types import ChunkNotes

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall, AttentionRule


class ContextAttention:
    """An AttentionRule that records for each of ``chunks``, with A the weights summed over heads:

    inter(i, j) = sum of A_km, k in chunk i, m in an earlier chunk j, and the same per token k;
    intra(i) = sum of A_km within chunk i, m < k.

    With a_l = sum_j inter_l(i, j) / (n_i * n_j) and b_l = intra_l / n_i^2, averaged over layers,
    CCI = 1 / (1 + exp(-a / b)) (Agarwal et al., SIGMOD 2025, arXiv:2502.15734). Every row of those
    chunks must be computed at every layer. ``then`` is another rule, called after this one.
    """

    def __init__(
        self, layout: Layout, chunks: Sequence[int], then: AttentionRule | None = None
    ) -> None:
        self.layout, self.chunks, self.then = layout, tuple(chunks), then
        spans = layout.prompt.spans
        self._per_token = {i: torch.zeros(spans[i][1] - spans[i][0]) for i in self.chunks}
        self._inter = {i: torch.zeros(i) for i in self.chunks}
        self._between = dict.fromkeys(self.chunks, 0.0)  # sum_l a_l
        self._within = dict.fromkeys(self.chunks, 0.0)  # sum_l b_l

    def __call__(self, call: AttentionCall) -> Tensor | None:
        spans = self.layout.prompt.spans
        for i in self.chunks:
            start, end = spans[i]
            at = int(torch.searchsorted(call.rows, start))
            weights = call.softmax(call.scores(slice(at, at + end - start))).sum(0).cpu()
            own = weights[:, start:end].tril(-1)
            self._within[i] += float(own.sum()) / (end - start) ** 2
            for j, (low, high) in enumerate(spans[:i]):
                per_token = weights[:, low:high].sum(1)
                self._per_token[i] += per_token
                self._inter[i][j] += per_token.sum()
                self._between[i] += float(per_token.sum()) / ((end - start) * (high - low))
        return self.then(call) if self.then is not None else None

    def notes(self, chunk: int) -> ChunkNotes:
        """The notes on one chunk, to be stored with its variant."""
        within, between = self._within[chunk], self._between[chunk]
        ratio = between / within if within else math.inf * between if between else 0.0
        return ChunkNotes(
            before=self.layout.names[:chunk],
            inter=tuple(self._inter[chunk].tolist()),
            per_token=tuple(self._per_token[chunk].tolist()),
            impact=1 / (1 + math.exp(-min(ratio, 30.0))),
        )
