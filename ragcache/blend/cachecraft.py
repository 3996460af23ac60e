"""Cache-Craft: keep several variants of a chunk, and recompute the tokens that depend on others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, ReusedKV, Selector, check_least
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall, AttentionRule
    from ragcache.types import ChunkNotes

__all__ = ["CacheCraft"]


@dataclass(frozen=True)
class CacheCraft(Blender):
    """Reuse, for each chunk, the variant whose original context is most like the new one.

    Agarwal et al., SIGMOD 2025, arXiv:2502.15734. A variant is KV cut from an earlier prompt. Its
    cache fix overhead CFO = ``alpha`` * CCI * (1 - b') is the share of its tokens to recompute,
    those that attended most to other chunks; b' is the part of that attention whose chunks precede
    it again, in the same order. The variant with the lowest CFO is reused. If that exceeds
    ``renew``, or there is no variant, the chunk is computed and stored as a variant.

    ``focus``: once the question's attention has separated the same chunks from the others for
    ``patience`` consecutive layers, tokens of the others are no longer recomputed.
    """

    alpha: float = 1.0
    renew: float = 0.5
    focus: bool = True
    patience: int = 3
    name: ClassVar[str] = "cachecraft"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.alpha, "alpha")
        check_least(self.renew, "renew")
        check_least(self.patience, "patience", 1)

    @property
    def reuses(self) -> ReusedKV:
        return "variant"

    def fix(self, notes: ChunkNotes, before: Sequence[bytes], exact: bool = False) -> float:
        """CFO of a variant whose chunk now follows the chunks ``before``, in [0, 1]."""
        again = _overlap(dict(zip(notes.before, notes.inter, strict=True)), before, exact)
        return min(1.0, self.alpha * notes.impact * (1 - again))

    def overhead(
        self, notes: ChunkNotes, before: Sequence[bytes], exact: bool = False
    ) -> float | None:
        cost = self.fix(notes, before, exact)
        return None if cost > self.renew else cost

    def selector(self, layout: Layout, layers: int) -> Selector:
        rows = [layout.reusable[:0]]
        for number, here in enumerate(layout.loaded):
            if here and (notes := layout.notes[number]) is not None:
                start, end = layout.prompt.spans[number]
                fix = self.fix(notes, layout.names[:number], layout.exact[number])
                count = math.ceil(fix * (end - start))
                looks_out = torch.tensor(notes.per_token)
                rows.append(start + looks_out.topk(count).indices.sort().values)
        return _Focused(layout, torch.cat(rows), self.patience if self.focus else layers + 1)


def _overlap(inter: Mapping[bytes, float], before: Sequence[bytes], exact: bool) -> float:
    """b' in [0, 1] of a chunk: how much of its original context precedes it again.

    ``inter``: its attention to each chunk of the original context, in their order. beta is the
    share of that attention that goes to chunks in ``before``, gamma the share of pairs of these
    chunks whose order has changed; b' = beta * (1 - gamma). It is 1 where everything before the
    chunk is the same (``exact``), and otherwise 0 if no chunk was in its original context.
    """
    if exact or not inter:
        return float(exact)
    place = {digest: at for at, digest in reversed(list(enumerate(before)))}
    common = [place[digest] for digest in inter if digest in place]
    total = sum(inter.values())
    beta = sum(weight for digest, weight in inter.items() if digest in place) / (total or 1)
    pairs = len(common) * (len(common) - 1) // 2
    discordant = sum(a > b for i, a in enumerate(common) for b in common[i + 1 :])
    return beta * (1 - discordant / max(1, pairs))


@dataclass
class _Focused(Selector):
    """Computes ``chosen``, and drops rows of chunks that the question does not attend to."""

    layout: Layout
    chosen: Tensor
    patience: int
    _attention: Tensor = field(init=False)  # of the question, per chunk, summed over layers
    _leading: list[frozenset[int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._attention = torch.zeros(len(self.layout.prompt.chunks))

    @property
    def attend(self) -> AttentionRule | None:
        return self._see if len(self.chosen) else None

    def first(self) -> Tensor:
        return self.chosen

    def narrows(self, layer: int) -> bool:
        return layer + 1 >= self.patience

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        last = self._leading[-self.patience :]
        if len(last) < self.patience or len(set(last)) > 1:
            return rows
        chunk = self.layout.chunk_of[torch.searchsorted(self.layout.reusable, rows)]
        return rows[torch.isin(chunk, torch.tensor(sorted(last[0])))]

    def _see(self, call: AttentionCall) -> None:
        weights = call.softmax(call.scores(self.layout.asking)).sum((0, 1)).cpu()
        spans = self.layout.prompt.spans
        self._attention += torch.stack([weights[a:b].sum() for a, b in spans])
        self._leading.append(_leading(self._attention))


def _leading(attention: Tensor) -> frozenset[int]:
    """The chunks before the largest relative gap in the order of descending attention (chunks,)."""
    order = attention.argsort(descending=True)
    ranked = attention[order]
    if len(ranked) < 2:
        return frozenset(order.tolist())
    gaps = (ranked[:-1] - ranked[1:]) / ranked[:-1].clamp_min(1e-12)
    return frozenset(order[: int(gaps.argmax()) + 1].tolist())
