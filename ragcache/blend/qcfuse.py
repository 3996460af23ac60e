"""QCFuse: ask a compressed view of the chunks what the question needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, Probe, Selector, check_ratio
from ragcache.blend.rank import Ranking, mean
from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall


@dataclass(frozen=True)
class QCFuse(Blender):
    """Recompute what the question attends to when it has read only the anchors of every chunk.

    Yan et al., arXiv:2606.05875. In the probe the question sees, of each chunk, its first
    ``sinks`` tokens and the share ``anchors`` of the others; a token's score is its attention
    weight among all tokens, averaged over question tokens, heads and ``critical_layers`` layers.
    The ``recompute_ratio`` with the highest is computed at all layers.

    The paper scores anchors and profiles layers offline. Here the anchors of a layer are the
    tokens whose keys have the smallest norm, which tend to be the most attended (Devoto et al.,
    EMNLP 2024, arXiv:2406.11430), and the critical layers are those in the middle.
    """

    recompute_ratio: float = 0.15
    anchors: float = 0.15
    sinks: int = 4
    critical_layers: int = 3
    name: ClassVar[str] = "qcfuse"

    def __post_init__(self) -> None:
        check_ratio(self.recompute_ratio)
        check_ratio(self.anchors, "anchors")
        if self.sinks < 0:
            raise ConfigError(f"sinks is {self.sinks}: it must be 0 or more")
        if self.critical_layers < 1:
            raise ConfigError(f"critical_layers is {self.critical_layers}: it must be 1 or more")

    def selector(self, layout: Layout, layers: int) -> Selector:
        count = int(self.recompute_ratio * len(layout.reusable))
        few = min(self.critical_layers, layers)
        start = (layers - few) // 2
        return _Anchored(layout, count, range(start, start + few), self)


@dataclass
class _Anchored(Ranking):
    count: int
    critical: range
    given: QCFuse
    scores: Tensor = field(init=False)  # per reusable row

    def __post_init__(self) -> None:
        self.scores = torch.zeros(len(self.layout.reusable))

    @property
    def probe(self) -> Probe | None:
        return Probe(self.critical.stop, self._see) if self.count else None

    def first(self) -> Tensor:
        return self.best(self.layout.reusable, self.scores, self.count)

    def _see(self, call: AttentionCall) -> Tensor:
        scores = call.scores()
        asking = scores[:, -len(self.layout.prompt.question) :]  # a view
        reusable = self.layout.reusable.to(scores.device)
        if call.layer in self.critical:
            self.scores += mean(call.softmax(asking).index_select(2, reusable)).cpu()
        hidden = reusable[~self._anchors(call.keys[:, reusable]).to(scores.device)]
        asking.index_fill_(2, hidden, float("-inf"))
        return call.attend(call.softmax(scores))

    def _anchors(self, keys: Tensor) -> Tensor:
        """Whether each reusable row is an anchor, by its ``keys`` (kv_heads, reusable, d)."""
        norms = keys.float().norm(dim=2).mean(0).cpu()
        chunk, place = self.layout.chunk_of, self.layout.place_in_chunk
        anchors = place < self.given.sinks
        for number in set(chunk.tolist()):
            rows = (chunk == number).nonzero()[:, 0]
            count = round(self.given.anchors * len(rows))
            anchors[rows[norms[rows].topk(count, largest=False).indices]] = True
        return anchors
