"""Chunks of unlike length in one forward, one after another in a single row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ragcache.engine.hf.attention_hook import Attended, AttentionOverride


class PackedForward(AttentionOverride):
    """One forward over chunks that all stand behind the same rows, none of which sees another.

    Prepacking (Zhao et al., arXiv:2404.09529): positions start again with every chunk, and every
    product over rows is computed for tokens only. Where the paper masks the attention of the whole
    row block by block, which costs as much as one text of that length, here each chunk's call is
    cut out and given to the model's own attention.

    The model makes its masks as if the row were one text. What it says there of the first ``n``
    rows holds for any chunk of ``n`` tokens: windows and the like count from the chunk's own start.
    """

    def __init__(self, config: Any, lengths: Sequence[int], start: int) -> None:
        super().__init__(config)
        self.start = start  # rows before the forward, which every chunk sees
        self.spans = list(pairwise(accumulate(lengths, initial=0)))

    @property
    def positions(self) -> list[int]:
        """Of every row: each chunk goes on behind the rows that all of them see."""
        return [self.start + at for first, end in self.spans for at in range(end - first)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Attended:
        own, outputs = self.own(module), []
        positions = kwargs.pop("position_ids", None)
        for first, end in self.spans:
            seen = self.start + end - first
            mask = None if attention_mask is None else attention_mask[:, :, : end - first, :seen]
            if positions is not None:
                kwargs["position_ids"] = positions[:, first:end]
            keys, values = (self._seen(t, first, end) for t in (key, value))
            outputs.append(own(module, query[:, :, first:end], keys, values, mask, **kwargs)[0])
        return torch.cat(outputs, 1), None

    def _seen(self, rows: Tensor, first: int, end: int) -> Tensor:
        """Keys or values, (1, kv_heads, start + n, d), that the chunk ``first:end`` sees."""
        own = rows[:, :, self.start + first : self.start + end]
        return torch.cat([rows[:, :, : self.start], own], 2) if self.start else own
