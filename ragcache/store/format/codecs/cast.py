"""Rounds numbers to a 16-bit dtype, such as that of a model's published weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ragcache.store.format.codecs.base import DTYPES, Bytes, LayerCodec, from_bytes, to_bytes
from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec


@dataclass(frozen=True)
class Cast(LayerCodec):
    """Keys, then values, each (kv_heads, tokens, head_dim) in C order, rounded to ``dtype``.

    They are decoded to KV's own dtype. Raises ValueError for numbers out of the range of ``dtype``.
    """

    dtype: str
    faithful: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.dtype

    def encode(self, keys: Tensor, values: Tensor, layer: int, layers: int) -> Bytes:
        rounded = [plane.to(DTYPES[self.dtype][0]) for plane in (keys, values)]
        back = [plane.to(keys.dtype) for plane in rounded]  # float16's largest, say, may round up
        if not all(bool(plane.isfinite().all()) for plane in (*rounded, *back)):
            raise ValueError(
                f"the KV holds NaN, infinities or more than {self.dtype} does: only codec 'raw' "
                "can store it"
            )
        return np.concatenate([to_bytes(plane) for plane in rounded])

    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        stored = from_bytes(data, self.dtype, (2, spec.kv_heads, tokens, spec.head_dim))
        both = stored.to(DTYPES[spec.dtype][0])
        if not bool(torch.isfinite(both).all()):
            raise ValueError("a number that is NaN or infinite")
        return both[0], both[1]

    def layer_bytes(self, spec: KVSpec, tokens: int) -> int:
        return 2 * spec.kv_heads * spec.head_dim * tokens * DTYPES[self.dtype][2].itemsize
