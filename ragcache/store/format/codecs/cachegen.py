"""Quantisation to a few levels, then entropy coding."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ragcache.store.format.codecs.base import DTYPES, Bytes, LayerCodec, to_bytes
from ragcache.store.format.codecs.entropy import bells, constriction_stream
from ragcache.store.format.codecs.peaks import read_peaks, scale_by_peaks
from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

_HEAD = struct.Struct("<4sBB2x")  # tag, bins of keys, bins of values
_TAG = b"cgn\x01"
_MOST_PER_BYTE = 128  # numbers: no bell spends less than 1/16 bit on one
_MOST_PER_NUMBER = 3  # bytes: no bell spends more than the 24 bits of TOTAL on one


@dataclass(frozen=True)
class CacheGen(LayerCodec):
    """Quantise per token, then code every channel with a distribution of its own.

    Liu et al., SIGCOMM 2024, arXiv:2310.07240. As in the authors' code, a token's keys share one
    scale over all heads, so do its values, and ``bins`` are bins - 1 levels around 0: a number is
    level / (bins / 2 - 1) * peak, off by at most half a step. Layers count from 0, in models of
    any depth. Two things differ from the paper:

    - No deltas to every tenth (anchor) token, which the authors' code does not use either. Keys
      here are those before RoPE: on the small model's, deltas of levels take 15 % more bytes,
      deltas quantised afresh 36 % more, at an error 14 % lower. With values it is no better.
    - A channel's distribution is the best of a fixed family (:mod:`.entropy`), named by one
      byte: a chunk has too few tokens to be worth a table for every channel.

    Bytes, little-endian: tag, bins of keys and of values, two zeros; peaks of keys, then of
    values, (tokens) each, in KV's dtype; the bell of every channel of keys, then of values,
    (kv_heads * head_dim) bytes each; 32-bit words of constriction's ANS coder, which gives keys
    before values, bells in rising order, and the channels of a bell in order, token by token.
    """

    key_first_layers: int = 10
    key_first_bins: int = 32
    key_second_bins: int = 16
    value_first_layers: int = 2
    value_first_bins: int = 32
    value_second_bins: int = 16
    name: ClassVar[str] = "cachegen"

    def __post_init__(self) -> None:
        keys = (self.key_first_bins, self.key_second_bins)
        for bins in (*keys, self.value_first_bins, self.value_second_bins):
            _check_bins(bins)

    def check(self) -> None:
        constriction_stream()

    def bins(self, layer: int) -> tuple[int, int]:
        """The bins of a layer's keys and of its values."""
        first_key, first_value = layer < self.key_first_layers, layer < self.value_first_layers
        return (
            self.key_first_bins if first_key else self.key_second_bins,
            self.value_first_bins if first_value else self.value_second_bins,
        )

    def encode(self, keys: Tensor, values: Tensor, layer: int, layers: int) -> Bytes:
        numbers, peaks = scale_by_peaks(keys, values, (1, 3))
        coder = constriction_stream().stack.AnsCoder()
        chosen = []
        bins = self.bins(layer)
        for plane, each in reversed(list(zip(numbers, bins, strict=True))):  # a stack: last first
            most = each // 2 - 1
            levels = (plane * most).round().int() + most
            symbols = levels.transpose(1, 2).reshape(-1, levels.shape[1]).numpy()
            family = bells(each - 1)
            chosen.append(family.best(symbols))
            for bell in np.unique(chosen[-1])[::-1]:
                coder.encode_reverse(symbols[chosen[-1] == bell].reshape(-1), family.models[bell])
        words = coder.get_compressed().astype("<u4", copy=False).view(np.uint8)
        head = np.frombuffer(_HEAD.pack(_TAG, *bins), np.uint8)
        return np.concatenate([head, to_bytes(peaks), *reversed(chosen), words])

    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        channels = spec.kv_heads * spec.head_dim
        peaks_end = _HEAD.size + 2 * tokens * spec.itemsize
        bells_end = peaks_end + 2 * channels
        if data.size < bells_end or (data.size - bells_end) % 4:
            raise ValueError(f"{data.size} bytes, not {bells_end} and some words")
        if 2 * channels * tokens > _MOST_PER_BYTE * data.size:  # allocate nothing for these
            raise ValueError(f"{data.size} bytes cannot hold {2 * channels * tokens} numbers")
        tag, *bins = _HEAD.unpack(data[: _HEAD.size].tobytes())
        if tag != _TAG:
            raise ValueError(f"the bytes do not begin with {_TAG!r}")
        peaks = read_peaks(data[_HEAD.size : peaks_end], spec.dtype, (2, tokens, 1))
        chosen = data[peaks_end:bells_end].reshape(2, channels)
        coder = constriction_stream().stack.AnsCoder(data[bells_end:].view("<u4").astype(np.uint32))
        both = torch.empty((2, spec.kv_heads, tokens, spec.head_dim), dtype=DTYPES[spec.dtype][0])
        for plane, each, rows, peak in zip(both, bins, chosen, peaks, strict=True):
            _check_bins(each)
            symbols = torch.from_numpy(_symbols(coder, rows, tokens, each - 1))
            most = each // 2 - 1
            levels = symbols.view(spec.kv_heads, spec.head_dim, tokens).transpose(1, 2) - most
            plane.copy_((levels.float() / most).mul_(peak))
        if not coder.is_empty():
            raise ValueError("words left over")
        keys, values = both
        return keys, values

    def most_bytes(self, spec: KVSpec, tokens: int) -> int:
        """The size with every number as the most expensive symbol, and the coder's state."""
        channels = spec.kv_heads * spec.head_dim
        head = _HEAD.size + 2 * tokens * spec.itemsize + 2 * channels
        return head + 2 * channels * tokens * _MOST_PER_NUMBER + 16


def _symbols(coder: Any, chosen: Bytes, tokens: int, levels: int) -> NDArray[np.int8]:
    """The next symbols of ``coder``, (channels, tokens), where each channel has its bell."""
    family = bells(levels)
    if chosen.max() >= len(family.models):
        raise ValueError("a channel without a distribution")
    channels = np.bincount(chosen)
    parts = [
        coder.decode(family.models[bell], int(channels[bell]) * tokens)
        for bell in np.flatnonzero(channels)
    ]
    symbols = np.empty((len(chosen), tokens), np.int8)
    symbols[chosen.argsort(kind="stable")] = np.concatenate(parts).reshape(-1, tokens)
    return symbols


def _check_bins(bins: int) -> None:
    if bins % 2 or not 4 <= bins <= 32:
        raise ValueError(f"{bins} bins: they must be even, 4 to 32")
