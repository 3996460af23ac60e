"""Chunks of different lengths in one forward: one sequence without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ragcache.engine.hf.attention_hook import AttentionOutput, AttentionOverride


class PackedForward(AttentionOverride):
    """One forward over several chunks that follow the same context and do not see each other.

    Prepacking (Zhao et al., arXiv:2404.09529): positions start again with every chunk, and no
    padding is computed. The paper masks the attention of the whole sequence, which costs as much
    as one text of that length. Here the attention of each chunk is computed by itself, with the
    model's own attention function.

    The model makes its mask as if the sequence were one text. The mask of its first ``n`` rows
    holds for any chunk of ``n`` tokens: sliding windows count from the chunk's own start.
    """

    def __init__(self, config: Any, lengths: Sequence[int], start: int) -> None:
        super().__init__(config)
        self.start = start  # rows of the context, which every chunk sees
        self.spans = list(pairwise(accumulate(lengths, initial=0)))

    @property
    def positions(self) -> list[int]:
        """Position of every row: each chunk continues after the context."""
        return [self.start + at for first, end in self.spans for at in range(end - first)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        attend, outputs = self.model_attention(module), []
        positions = kwargs.pop("position_ids", None)
        for first, end in self.spans:
            seen = self.start + end - first
            mask = None if attention_mask is None else attention_mask[:, :, : end - first, :seen]
            if positions is not None:
                kwargs["position_ids"] = positions[:, first:end]
            keys, values = (self._seen(t, first, end) for t in (key, value))
            outputs.append(attend(module, query[:, :, first:end], keys, values, mask, **kwargs)[0])
        return torch.cat(outputs, 1), None

    def _seen(self, rows: Tensor, first: int, end: int) -> Tensor:
        """Keys or values, (1, kv_heads, start + n, d), that the chunk ``first:end`` sees."""
        own = rows[:, :, self.start + first : self.start + end]
        return torch.cat([rows[:, :, : self.start], own], 2) if self.start else own
