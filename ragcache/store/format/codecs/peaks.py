"""Peaks, the largest magnitudes, by which the lossy codecs scale numbers.

A peak is one of the numbers that it scales, so KV's own dtype holds it exactly: large values do not
overflow, subnormals do not vanish, and the number itself is decoded unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ragcache.store.format.codecs.base import Bytes, from_bytes

if TYPE_CHECKING:
    from torch import Tensor


def scale_by_peaks(keys: Tensor, values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Numbers over their peak, float32 in [-1, 1], and the peaks, in the dtype of ``keys``.

    Both are on the CPU; the first is (2, kv_heads, tokens, head_dim), the second has size 1 in
    ``dims``, over which a peak is shared. Where all numbers are 0, so is the peak. Raises
    ValueError for NaN and infinities.
    """
    numbers = torch.stack([keys, values]).detach().cpu().float()
    peaks = numbers.abs().amax(dims, keepdim=True)
    if not peaks.isfinite().all():
        raise ValueError("the KV holds NaN or infinities: no answer may come from it")
    return numbers.div_(peaks.where(peaks > 0, 1.0)), peaks.to(keys.dtype)


def read_peaks(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The stored peaks, as float32. Raises ValueError where one of them cannot be a peak."""
    peaks = from_bytes(data, dtype, shape).float()
    if not ((peaks >= 0) & peaks.isfinite()).all():
        raise ValueError("a largest magnitude that is none")
    return peaks
