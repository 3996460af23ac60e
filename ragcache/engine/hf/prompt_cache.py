"""The KV of one prompt, in place from the first layer to the last generated token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ragcache.util.buffer_pool import BufferPool

__all__ = ["PlacedKV", "StopAfterKV"]

#: Called with a layer's number, its fresh keys (after RoPE) and values, (kv_heads, n, head_dim).
_OnFreshKV = Callable[[int, Tensor, Tensor], None]


class StopAfterKV(Exception):
    """Stops a layer's forward once its fresh KV is written."""


class PlacedKV(Cache):
    """A transformers cache with a preallocated buffer per layer, whose rows are written in place.

    Each buffer has ``capacity`` rows. ``rows`` are the rows that the running forward computes
    (None: the last ones, in order). ``update`` scatters their KV into the buffer and returns all
    ``length`` rows to the attention. Nothing is copied between prefill and decode. Buffers in host
    memory come from ``blocks``, which reuses memory: the system zeroes the pages of new memory.
    """

    def __init__(self, layers: int, capacity: int, blocks: BufferPool) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.blocks = blocks
        self.length = 0  # rows that the attention sees
        self.start = 0  # first row of the running forward
        self.rows: Tensor | None = None  # sorted int64
        self.on_fresh: _OnFreshKV | None = None
        self.stop_after_kv = False  # whether ``update`` raises StopAfterKV after writing
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def begin(self, tokens: int) -> None:
        """Begin a forward over the next ``tokens`` rows."""
        assert self.length + tokens <= self.capacity, "KV capacity is planned before prefill"
        self.start, self.length = self.length, self.length + tokens

    def crop(self, rows: int) -> None:
        """Keep the first ``rows`` rows. What the others hold stays until it is overwritten."""
        assert rows <= self.length, "a cache is cropped to rows that it has"
        self.length = rows

    def continued(self, room: int) -> PlacedKV:
        """A copy with ``room`` for more rows. This cache is unchanged, and may be copied again."""
        copy = self.beginning(self.length, self.length + room)
        copy.length = self.length
        return copy

    def beginning(self, rows: int, capacity: int) -> PlacedKV:
        """A cache of ``capacity`` in which the first ``rows`` rows hold those of this one. They
        count as written in place; its length is 0."""
        copy = PlacedKV(len(self._keys), capacity, self.blocks)
        for layer in range(len(self._keys)):
            buffers = self.buffers(layer)
            for own, into in zip(buffers, copy.allocated(layer, buffers), strict=True):
                into[:, :, :rows] = own[:, :, :rows]
        return copy

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys (after RoPE) and values, each (1, kv_heads, capacity, head_dim)."""
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None, "rows are written before they are read"
        return keys, values

    def allocated(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As :meth:`buffers`, allocated on first use with heads, dtype and device of ``like``."""
        if self._keys[layer] is None:
            self._keys[layer], self._values[layer] = map(self._empty, like)
        return self.buffers(layer)

    def _empty(self, like: Tensor) -> Tensor:
        shape = (*like.shape[:2], self.capacity, like.shape[3])
        if like.device.type == "cpu":
            return self.blocks.tensor(shape, like.dtype)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.allocated(layer_idx, (key_states, value_states))
        if self.rows is None:
            end = self.start + key_states.shape[2]
            keys[:, :, self.start : end] = key_states
            values[:, :, self.start : end] = value_states
        else:
            keys.index_copy_(2, self.rows, key_states)
            values.index_copy_(2, self.rows, value_states)
        if self.on_fresh is not None:
            self.on_fresh(layer_idx, key_states[0], value_states[0])
        if self.stop_after_kv:
            raise StopAfterKV
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.capacity

    @property
    def is_compileable(self) -> bool:
        return False
