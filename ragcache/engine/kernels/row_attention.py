"""Attention of a few rows out of many, on a GPU.

A model whose rows are cut attends with a mask: SDPA then computes the scores of all keys for every
row, hides half of them, and wants keys and values copied for each query head. That is the
reference. What is here leaves out the keys behind a row instead (on a CPU, see groups.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

#: Query vectors that a program of the kernel takes.
BLOCKS = 128, 64, 32, 16

Attend = Callable[..., Tensor]  # of query, key, value and scale, by these names


class RowAttention(ABC):
    """Attention of ``rows``, sorted int64, of the prompt, each to the keys up to itself."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._masks: dict[int, tuple[Tensor, bool]] = {}  # by id; the tensor keeps it

    def sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
    ) -> Tensor | None:
        """Scaled dot-product attention; (1, heads, rows, d) in, (1, rows, heads, d) out.

        None where ``mask`` says anything else than ``key <= row``, such as a sliding window: that
        is for the model's own implementation.
        """
        if not self._causal(mask) or value.shape[3] != key.shape[3]:
            return None
        dim = query.shape[3]
        return self.attend(query, key, value, dim**-0.5 if scale is None else scale)

    def variants(self) -> list[Attend]:
        """Everything that ``attend`` may turn into, to be tried before it is relied on."""
        return [self.attend]

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The same; causal."""

    def _causal(self, mask: Tensor) -> bool:
        """Layers are given the same mask again and again: it is looked at once."""
        if id(mask) not in self._masks:
            every = torch.arange(mask.shape[-1], device=mask.device)
            plain = every <= self.rows.to(mask.device)[:, None]
            same = mask.dtype == torch.bool and torch.equal(mask, plain[None, None])
            self._masks[id(mask)] = mask, same
        return self._masks[id(mask)][1]


class TritonRowAttention(RowAttention):
    """By our own kernel in Triton."""

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

    def variants(self) -> list[Attend]:
        return [
            partial(self.attend, blocks=sizes) for sizes in (BLOCKS, *((size,) for size in BLOCKS))
        ]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """SDPA by any backend but cuDNN's, which makes a new plan for every length."""
    was = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
