"""The contract of a codec: encodes and decodes the KV of a chunk, layer by layer."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

__all__ = ["Bytes", "Codec", "DTYPES", "LayerCodec", "from_bytes", "to_bytes"]

Bytes = NDArray[np.uint8]  # one-dimensional

#: dtype name -> torch dtype, integer dtype of the same width, its stored (little-endian) form.
#: NumPy has no bfloat16: KV crosses into it as integers, bit for bit.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, np.dtype[Any]]] = {
    "float32": (torch.float32, torch.int32, np.dtype("<i4")),
    "bfloat16": (torch.bfloat16, torch.int16, np.dtype("<i2")),
    "float16": (torch.float16, torch.int16, np.dtype("<i2")),
}


class Codec(ABC):
    """Encodes and decodes the layers of a chunk. Stateless and thread-safe. Its name is part of
    every key."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False  # decodes to the same bits
    faithful: ClassVar[bool] = False  # rounds at most to the precision of published weights

    @abstractmethod
    def encode_layers(self, pairs: Sequence[KVPair]) -> Iterator[Bytes]:
        """The bytes of every layer, encoded on iteration.

        ``pairs``: keys (before RoPE) and values of all layers, each (kv_heads, tokens, head_dim),
        of one dtype of :data:`DTYPES`, on any device, and finite.
        """

    @abstractmethod
    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        """Keys and values of a layer, each (kv_heads, tokens, head_dim), in the dtype of ``spec``.

        ``data`` are the bytes of the layer :meth:`payload_of` it. The pair is finite, and may share
        the memory of ``data``, of which the codec takes ownership. The checksum of ``data`` was
        checked. Raises ValueError where it still is not a layer of this shape.
        """

    def decode_layers(self, raws: Sequence[Bytes], spec: KVSpec, tokens: int) -> Iterator[KVPair]:
        """The pairs of all layers from what :meth:`encode_layers` gave, which is left as it is."""
        for layer in range(spec.layers):
            yield self.decode(raws[self.payload_of(layer)].copy(), spec, tokens, layer)

    def payload_of(self, layer: int) -> int:
        """The layer whose bytes hold ``layer``: an earlier one, where several are encoded together
        and the bytes of the others are empty."""
        return layer

    def check(self) -> None:
        """Raise ConfigError where a package that the codec needs is not installed."""
        return

    def layer_bytes(self, spec: KVSpec, tokens: int) -> int | None:
        """The size of every layer in bytes; None where it depends on the values."""
        return None

    def most_bytes(self, spec: KVSpec, tokens: int) -> int:
        """The most bytes that a layer can take; longer ones are not read. A codec without fixed
        sizes overrides this."""
        size = self.layer_bytes(spec, tokens)
        return spec.layer_bytes(tokens) if size is None else size


class LayerCodec(Codec):
    """A codec that encodes each layer alone."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, layer: int, layers: int) -> Bytes:
        """The bytes of layer ``layer`` of ``layers``, of its pair as in :meth:`encode_layers`."""

    def encode_layers(self, pairs: Sequence[KVPair]) -> Iterator[Bytes]:
        return (self.encode(*pair, layer, len(pairs)) for layer, pair in enumerate(pairs))


def is_finite(tensor: Tensor) -> bool:
    """Whether a non-empty tensor has no NaN or infinity. One pass: NaN shows in both bounds."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def to_bytes(tensor: Tensor) -> Bytes:
    """A tensor's numbers in C order, little-endian."""
    _, integers, stored = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    native = tensor.detach().cpu().contiguous().view(integers).numpy().reshape(-1)
    return native.astype(stored, copy=False).view(np.uint8)


def from_bytes(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that ``to_bytes`` encoded; shares the memory of ``data``. Raises ValueError for
    another size."""
    kind, _, stored = DTYPES[dtype]
    if data.size != stored.itemsize * math.prod(shape):
        raise ValueError(f"{data.size} bytes for shape {shape}")
    if sys.byteorder == "big":
        data.view(stored).byteswap(inplace=True)
    return torch.from_numpy(data).view(kind).view(shape)
