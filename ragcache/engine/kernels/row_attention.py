"""Attention of some rows of a prompt, on a GPU.

If only some rows are computed, transformers attends with a mask: SDPA computes the scores of all
keys for every row, masks those of later tokens, and copies keys and values for each query head.
That is the reference. The classes here skip the keys after each row instead, as
``engine/hf/grouped_attention.py`` does on a CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

#: Query vectors per program of the kernel.
BLOCKS = 128, 64, 32, 16

_Attend = Callable[..., Tensor]  # keyword arguments query, key, value and scale


class RowAttention(ABC):
    """Causal attention of ``rows`` (sorted, int64) of a prompt: each sees the keys up to itself."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._masks: dict[int, tuple[Tensor, bool]] = {}  # by id, which the kept tensor reserves

    def sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
    ) -> Tensor | None:
        """Scaled dot-product attention; (1, heads, rows, d) in, (1, rows, heads, d) out.

        None if ``mask`` (1, 1, rows, keys) is not ``key <= row``, for instance because of a sliding
        window: the model's own implementation then has to compute the attention.
        """
        if not self._causal(mask) or value.shape[3] != key.shape[3]:
            return None
        dim = query.shape[3]
        return self.attend(query, key, value, dim**-0.5 if scale is None else scale)

    def variants(self) -> list[_Attend]:
        """The configurations that ``attend`` may use, each to be tested before it is relied on."""
        return [self.attend]

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention; shapes as for :meth:`sdpa`."""

    def _causal(self, mask: Tensor) -> bool:
        """Whether the mask is causal. Layers share one mask, so it is compared once."""
        if id(mask) not in self._masks:
            every = torch.arange(mask.shape[-1], device=mask.device)
            plain = every <= self.rows.to(mask.device)[:, None]
            same = mask.dtype == torch.bool and torch.equal(mask, plain[None, None])
            self._masks[id(mask)] = mask, same
        return self._masks[id(mask)][1]


class TritonRowAttention(RowAttention):
    """Attention by the kernel of ``triton_attention``."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        blocks: Sequence[int] = BLOCKS,
    ) -> Tensor:
        from ragcache.engine.kernels.triton_attention import attend

        return attend(query, key, value, self.rows, scale, blocks)

    def variants(self) -> list[_Attend]:
        return [
            partial(self.attend, blocks=sizes) for sizes in (BLOCKS, *((size,) for size in BLOCKS))
        ]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable SDPA's cuDNN backend, which builds a new plan for every length: of a prompt, of a
    batch of chunks, and of each token that is decoded."""
    was = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
