"""Fused, the default method: recompute the tokens that depend most on the text before their chunk,
and those that the question and the answer look at."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import FixedRows, Layout, RatioBlender, Selector, check_ratio
from ragcache.blend.ranking import highest, peak
from ragcache.engine.base import Repair

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionCall

#: The least score of a row that is computed late: what its error changes of an attention output.
_LEAST = 1e-3
#: The most rows that are computed late for one token of the answer, as a share of all.
_PER_TOKEN = 0.02


@dataclass(frozen=True)
class Fused(RatioBlender):
    """Recompute up to ``recompute_ratio`` of all tokens at all layers, chosen in three steps.

    1. The share ``1 - attention`` of them, before anything is seen: those with the largest
       sensitivity u, the squared relative change of a token's values behind other text, which is
       stored with every chunk (see :mod:`ragcache.core.sensitivity`).
    2. A half of the others when the question (the text after the last chunk) has seen the prompt,
       with the largest

           mean over layers of sqrt(u) * max over heads and question tokens of the attention weight,

       to first order the most that their error changes an attention output. The question's tokens
       are computed again with them.
    3. The other half while the answer is decoded, by the same score for its latest token, which is
       then computed again. Rows whose score is below a thousandth are left as they are.

    Layers are those in which answers depend on the tokens of chunks: all but the first third and
    the last sixth. An engine that cannot compute rows while it decodes computes the rows of step 3
    in step 2, and one that shows no attention weights all rows in step 1. The method is ragcache's
    own, without a paper; docs/choosing-tokens.md has the measurements that it is based on.
    """

    attention: float = 0.5
    name: ClassVar[str] = "fused"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.attention, "attention")

    @property
    def revision(self) -> int:
        return 2

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
        rows = layout.reusable
        count = int(self.recompute_ratio * len(rows))
        late = int(self.attention * count) if count < len(rows) else 0
        asking = late // 2 if layout.repairs else late
        answering = late - asking
        if asking < layout.ending:
            asking = 0
        first = highest(rows, layout.sensitivity, count - asking - answering)
        if not asking + answering:
            return FixedRows(first)
        return _SensitiveFirst(first, _Attended(layout, first, layers, asking, answering))


@dataclass(frozen=True)
class _SensitiveFirst(FixedRows):
    """Computes the same rows at every layer, and more of them late."""

    attended: _Attended

    @property
    def repair(self) -> Repair:
        return self.attended


class _Attended(Repair):
    """Chooses rows that were not computed, by attention times sensitivity: at most ``asking`` for
    the question, and what is left of these and ``answering`` more for the answer."""

    def __init__(
        self, layout: Layout, computed: Tensor, layers: int, asking: int, answering: int
    ) -> None:
        self.tokens, self.positions = layout.prompt.tokens, layout.positions
        self.rows: list[Tensor] = []
        self.again = 0
        self._reusable = layout.reusable
        self._error = layout.sensitivity.clamp_min(0).sqrt()  # of each reusable row
        self._error[torch.searchsorted(self._reusable, computed)] = 0
        third, sixth = layers // 3, layers // 6
        self._layers = range(third, max(third + 1, layers - sixth))
        self.asking = layout.ending if asking else 0
        self._asking: int | None = asking  # None: the question has looked
        self._answering = answering
        self._rows = layout.ending  # last rows whose attention is seen
        self.looking = asking > 0
        self._seen: Tensor | None = None  # their peak attention, summed over layers

    def see(self, call: AttentionCall) -> None:
        if self.looking and call.layer in self._layers:
            weights = call.softmax(call.scores(slice(-self._rows, None)))
            found = peak(weights.index_select(2, self._reusable.to(weights.device)))
            self._seen = found if self._seen is None else self._seen + found

    def take(self) -> Tensor:
        if self._asking is not None:  # the question looked
            most, self._asking = self._asking, None
            self._answering += most
        else:
            most = max(1, int(_PER_TOKEN * len(self._reusable)))
        rows = self._worst(min(most, self._answering))
        self._error[torch.searchsorted(self._reusable, rows)] = 0
        self._answering -= len(rows)
        if len(rows):
            self.rows.append(rows)
            self.again += self._rows
        self._rows = 1
        self.looking = self._answering > 0
        return rows

    def _worst(self, most: int) -> Tensor:
        """At most ``most`` rows with the highest scores for what was seen, which is forgotten."""
        seen, self._seen = self._seen, None
        if seen is None or not most:
            return self._reusable[:0]
        scores = seen.cpu() / len(self._layers) * self._error
        count = min(most, int((scores >= _LEAST).sum()))
        return highest(self._reusable, scores, count)

    def copy(self) -> _Attended:
        same = copy.copy(self)
        same.rows, same._error = [*self.rows], self._error.clone()
        return same
