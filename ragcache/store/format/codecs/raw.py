"""The KV as it is, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ragcache.store.format.codecs.base import Bytes, LayerCodec, from_bytes, is_finite, to_bytes
from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec


class Raw(LayerCodec):
    """Keys, then values, each (kv_heads, tokens, head_dim) in C order, little-endian."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True
    faithful: ClassVar[bool] = True

    def encode(self, keys: Tensor, values: Tensor, layer: int, layers: int) -> Bytes:
        return np.concatenate([to_bytes(keys), to_bytes(values)])

    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        both = from_bytes(data, spec.dtype, (2, spec.kv_heads, tokens, spec.head_dim))
        if not is_finite(both):
            raise ValueError("it holds NaN or infinities")
        return both[0], both[1]

    def layer_bytes(self, spec: KVSpec, tokens: int) -> int:
        return spec.layer_bytes(tokens)
