"""Eight-bit floats, scaled per token and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ragcache.store.format.codecs.quantize import ByteQuantizer

if TYPE_CHECKING:
    from torch import Tensor


class Fp8(ByteQuantizer):
    """float8_e4m3fn with one scale per token and head: a number is code / 448 * peak.

    448 is the largest of these floats. A number is off by at most 1/16 of itself, or peak / 448 /
    1024 if that is more, before it is rounded to KV's dtype.
    """

    name: ClassVar[str] = "fp8"
    tag: ClassVar[bytes] = b"f8s\x01"

    def to_codes(self, numbers: Tensor) -> Tensor:
        return numbers.mul_(448).to(torch.float8_e4m3fn)

    def from_codes(self, codes: Tensor) -> Tensor:
        if (codes & 0x7F).amax() == 0x7F:
            raise ValueError("a code that is NaN")
        # Sign, exponent and mantissa, moved to where a float16 has them, make code / 256, exactly:
        # several times faster than torch's own conversion.
        bits = codes.to(torch.int16)
        return ((bits & -0x8000) | ((bits & 0x7F) << 7)).view(torch.float16).float().div_(1.75)
