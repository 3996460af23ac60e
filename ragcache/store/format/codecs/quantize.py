"""The base of codecs with one byte per number, scaled per token and head."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ragcache.store.format.codecs.base import DTYPES, Bytes, LayerCodec, to_bytes
from ragcache.store.format.codecs.peaks import read_peaks, scale_by_peaks
from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

__all__ = ["ByteQuantizer"]


class ByteQuantizer(LayerCodec):
    """Four bytes ``tag``, then peaks, then codes, each of keys and then of values, in C order.

    Peaks are (kv_heads, tokens) in KV's dtype, little-endian; codes are (kv_heads, tokens,
    head_dim), a byte each. Decoded KV encodes to the same bytes again, unless a value was rounded
    to a subnormal of KV's dtype.
    """

    tag: ClassVar[bytes]  # the last byte counts versions

    @abstractmethod
    def to_codes(self, numbers: Tensor) -> Tensor:
        """One-byte codes of float32 in [-1, 1], which may be overwritten."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """float32 in [-1, 1] from codes, given as int8. Raises ValueError for an invalid code."""

    def encode(self, keys: Tensor, values: Tensor, layer: int, layers: int) -> Bytes:
        numbers, peaks = scale_by_peaks(keys, values, (-1,))
        codes = self.to_codes(numbers).view(torch.uint8).numpy().reshape(-1)
        return np.concatenate([np.frombuffer(self.tag, np.uint8), to_bytes(peaks), codes])

    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        if data.size != self.layer_bytes(spec, tokens):
            raise ValueError(f"{data.size} bytes, not {self.layer_bytes(spec, tokens)}")
        if data[:4].tobytes() != self.tag:
            raise ValueError(f"the bytes do not begin with {self.tag!r}")
        rows = (2, spec.kv_heads, tokens)
        start = 4 + 2 * spec.kv_heads * tokens * spec.itemsize
        peaks = read_peaks(data[4:start], spec.dtype, (*rows, 1))
        codes = torch.from_numpy(data[start:].view(np.int8)).view(*rows, spec.head_dim)
        keys, values = self.from_codes(codes).mul_(peaks).to(DTYPES[spec.dtype][0])
        return keys, values

    def layer_bytes(self, spec: KVSpec, tokens: int) -> int:
        return 4 + 2 * spec.kv_heads * tokens * (spec.itemsize + spec.head_dim)
