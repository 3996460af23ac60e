"""Eight-bit integers, scaled per token and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ragcache.store.format.codecs.quantize import ByteQuantizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Int8"]


class Int8(ByteQuantizer):
    """Symmetric int8 with one scale per token and head: a number is code / 127 * peak.

    A number is off by at most half a step, peak / 254, before it is rounded to KV's dtype.
    """

    name: ClassVar[str] = "int8"
    tag: ClassVar[bytes] = b"i8s\x01"

    def to_codes(self, numbers: Tensor) -> Tensor:
        return numbers.mul_(127).round_().to(torch.int8)

    def from_codes(self, codes: Tensor) -> Tensor:
        if codes.amin() == -128:
            raise ValueError("code -128, which is beyond the peak")
        return codes.float().div_(127)
