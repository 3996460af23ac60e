"""Hooks that let a Walk drive a model's own layers, for the length of one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ragcache.engine.attention import Detour
from ragcache.engine.base import Walk
from ragcache.engine.kv import PlacedKV
from ragcache.engine.rope import Rope


@dataclass(frozen=True)
class Layers:
    """A model's decoder layers, and how each of them rotates its keys."""

    modules: Sequence[nn.Module]
    rope: Rope
    rotates: Sequence[bool]  # some architectures have layers without RoPE

    @contextmanager
    def driven(
        self,
        kv: PlacedKV,
        driver: Driver,
        total: int,
        *,
        detour: Detour | None = None,
        until: int | None = None,
    ) -> Iterator[None]:
        """While this lasts, a forward over ``total`` rows computes those that ``driver`` names.

        ``detour`` is told of every layer before it is computed. The forward ends with
        :class:`Enough` in front of layer ``until``.
        """
        cutter = _Cutter(self, kv, driver, total, detour, until)
        handles = [
            module.register_forward_pre_hook(cutter.hook(index), with_kwargs=True)
            for index, module in enumerate(self.modules)
        ]
        kv.on_fresh = driver.after
        try:
            yield
        finally:
            kv.on_fresh = kv.rows = None
            for handle in handles:
                handle.remove()


class Enough(Exception):
    """Ends a forward whose further layers nobody wants."""


class Driver(Protocol):
    """A Walk over tensors with a batch dimension."""

    def before(self, layer: int, view: View) -> Tensor: ...

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None: ...


class Single:
    """A public Walk over a batch of one."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def before(self, layer: int, view: View) -> Tensor:
        return self.walk.before(layer, view)

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.walk.after(layer, keys[0], values[0])


class Every:
    """Computes every row."""

    def before(self, layer: int, view: View) -> Tensor:
        return view.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        pass


class Capture:
    """Computes every row and keeps every layer's fresh KV, keys before RoPE."""

    def __init__(self, unrotate: bool = True) -> None:
        self.unrotate = unrotate
        self.keys: list[Tensor] = []  # per layer, (batch, kv_heads, n, head_dim)
        self.values: list[Tensor] = []

    def before(self, layer: int, view: View) -> Tensor:
        self.view = view
        return view.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys.append(self.view.unrotate(keys) if self.unrotate else keys)
        self.values.append(values)


class View:
    """A LayerView: one layer's buffers with that layer's own cos and sin."""

    def __init__(
        self, layers: Layers, kv: PlacedKV, layer: int, angles: tuple[Tensor, Tensor]
    ) -> None:
        self._rope = layers.rope if layers.rotates[layer] else None
        self._kv, self._layer = kv, layer
        self.angles = self._cos, self._sin = angles  # (1, rows, rotary_dim)
        self.all_rows = torch.arange(angles[0].shape[1], device=angles[0].device)

    def place(self, start: int, keys: Tensor, values: Tensor) -> None:
        device = self._cos.device
        keys, values = keys.to(device)[None], values.to(device)[None]
        k, v = self._kv.allocated(self._layer, (keys, values))
        span = slice(start, start + keys.shape[2])
        if self._rope is not None:
            keys = self._rope.rotate(keys, self._cos[:, span], self._sin[:, span])
        k[:, :, span] = keys
        v[:, :, span] = values

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._kv.buffers(self._layer)
        rows = rows.to(k.device)
        return k[0].index_select(1, rows), v[0].index_select(1, rows)

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = (t[:, :, start:stop] for t in self._kv.buffers(self._layer))
        return on_host(self.unrotate(k, start)[0], v.dtype), on_host(v[0], v.dtype)

    def unrotate(self, keys: Tensor, start: int = 0) -> Tensor:
        """Keys of the rows from ``start`` on, (batch, kv_heads, n, head_dim), before RoPE."""
        if self._rope is None:
            return keys
        span = slice(start, start + keys.shape[2])
        return self._rope.unrotate(keys, self._cos[:, span], self._sin[:, span])


class _Cutter:
    """Pre-hooks that cut a layer's inputs down to the rows that its driver names."""

    def __init__(
        self,
        layers: Layers,
        kv: PlacedKV,
        driver: Driver,
        total: int,
        detour: Detour | None,
        until: int | None,
    ) -> None:
        self.layers, self.kv, self.driver, self.total = layers, kv, driver, total
        self.detour, self.until = detour, until
        self.rows: Tensor | None = None  # of the layer before; None while all are computed
        self._causal: Tensor | None = None

    def hook(self, layer: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer == self.until:
                raise Enough
            angles = kwargs["position_embeddings"]
            view = View(self.layers, self.kv, layer, angles)
            rows = self.driver.before(layer, view).to(angles[0].device)
            if self.detour is not None:
                self.detour.at(layer, rows)
            if len(rows) == self.total:
                return None
            hidden = self._narrowed(rows, args[0] if args else kwargs["hidden_states"])
            cut = {**kwargs, **self._cut(rows, kwargs)}
            if args:
                return (hidden, *args[1:]), cut
            return args, {**cut, "hidden_states": hidden}

        return before

    def _narrowed(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """``hidden``, which holds the rows of the layer before, cut down to ``rows``."""
        if self.rows is not None and len(rows) == len(self.rows):  # a subset: the same rows
            return hidden
        local = rows if self.rows is None else torch.searchsorted(self.rows, rows)
        self.rows = self.kv.rows = rows
        self._causal = None
        return hidden.index_select(1, local)

    def _cut(self, rows: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {
            "position_embeddings": tuple(
                t.index_select(1, rows) for t in kwargs["position_embeddings"]
            )
        }
        if kwargs.get("position_ids") is not None:
            out["position_ids"] = kwargs["position_ids"].index_select(1, rows)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            out["attention_mask"] = mask.index_select(2, rows)
            return out
        if self._causal is None:  # the model left causality to its kernel: say it for these rows
            every = torch.arange(self.total, device=rows.device)
            self._causal = (every[None] <= rows[:, None])[None, None]
        out["attention_mask"] = self._causal
        return out


def on_host(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in host memory."""
    return rows.to(device="cpu", dtype=dtype, copy=True).contiguous()
