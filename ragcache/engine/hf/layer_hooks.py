"""Forward pre-hooks that let PrefillCallbacks drive a model's own decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf.attention_hook import AttentionOverride
from ragcache.engine.hf.prompt_cache import PlacedKV, StopAfterKV
from ragcache.engine.hf.rope import Rope
from ragcache.engine.kernels.choose import Kernels, place_by_torch
from ragcache.types import KVPair

__all__ = ["DecoderLayers", "PlacedLayerView"]


@dataclass(frozen=True)
class DecoderLayers:
    """A model's decoder layers, and how they rotate their keys."""

    modules: Sequence[nn.Module]
    rope: Rope  # of every layer that has RoPE
    rotates: Sequence[bool]  # whether each layer has RoPE
    kernels: Kernels = Kernels()

    @contextmanager
    def hooked(
        self,
        kv: PlacedKV,
        callbacks: PrefillCallbacks,
        total: int,
        override: AttentionOverride,
        *,
        until: int | None = None,
    ) -> Iterator[None]:
        """A context manager in which a forward over ``total`` rows computes only the rows that
        ``callbacks`` return.

        Every layer is announced to ``override`` before it is computed. The forward raises
        :class:`StopForward` before layer ``until``; None: it computes all layers.
        """
        pruner = _RowPruner(self, kv, callbacks, total, override, until)
        handles = [
            module.register_forward_pre_hook(pruner.hook(index), with_kwargs=True)
            for index, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            kv.on_fresh = kv.rows = None
            for handle in handles:
                handle.remove()


class StopForward(Exception):
    """Stops a forward pass early."""


class CaptureKV(PrefillCallbacks):
    """Computes every row, and collects the KV of every layer, with keys before RoPE."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # per layer, (kv_heads, n, head_dim)
        self.values: list[Tensor] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = cast(PlacedLayerView, kv)
        return kv.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys.append(self.view.unrotate(keys))
        self.values.append(values)


class PlacedLayerView:
    """A :class:`~ragcache.engine.base.LayerView` of one layer of a :class:`PlacedKV`.

    ``angles``: the layer's own cos and sin of all rows, each (1, rows, rotary_dim), float32.
    """

    def __init__(
        self, layers: DecoderLayers, kv: PlacedKV, layer: int, angles: tuple[Tensor, Tensor]
    ) -> None:
        self._rope = layers.rope if layers.rotates[layer] else None
        self._kv, self._layer = kv, layer
        self._by_kernel = layers.kernels.place
        self.angles = self._cos, self._sin = angles
        self.all_rows = torch.arange(angles[0].shape[1], device=angles[0].device)

    def place(self, start: int, parts: Sequence[KVPair]) -> None:
        if not parts:
            return
        on_device = [(self._to_device(keys), self._to_device(values)) for keys, values in parts]
        first_keys, first_values = on_device[0]
        k, v = self._kv.allocated(self._layer, (first_keys[None], first_values[None]))
        span = slice(start, start + sum(keys.shape[1] for keys, _ in on_device))
        angles = None if self._rope is None else (self._cos[0, span], self._sin[0, span])
        out = k[0, :, span], v[0, :, span]
        if self._by_kernel is not None:
            self._by_kernel(on_device, angles, out)
        else:
            place_by_torch(self._rope, on_device, angles, out)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._cos.device, non_blocking=True)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._kv.buffers(self._layer)
        rows = rows.to(k.device)
        return k[0].index_select(1, rows), v[0].index_select(1, rows)

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = (t[0, :, start:stop] for t in self._kv.buffers(self._layer))
        return copy_to_host(self.unrotate(k, start), v.dtype), copy_to_host(v, v.dtype)

    def unrotate(self, keys: Tensor, start: int = 0) -> Tensor:
        """Undo RoPE: ``keys`` (kv_heads, n, head_dim) of the rows from ``start`` on."""
        if self._rope is None:
            return keys
        span = slice(start, start + keys.shape[1])
        return self._rope.unrotate(keys[None], self._cos[:, span], self._sin[:, span])[0]


class _RowPruner:
    """Forward pre-hooks that reduce the inputs of layers to the rows that callbacks return."""

    def __init__(
        self,
        layers: DecoderLayers,
        kv: PlacedKV,
        callbacks: PrefillCallbacks,
        total: int,
        override: AttentionOverride,
        until: int | None,
    ) -> None:
        self.layers, self.kv, self.callbacks, self.total = layers, kv, callbacks, total
        self.override, self.until = override, until
        self.rows: Tensor | None = None  # rows of the hidden states; None: all
        self._selected_rows: dict[int, tuple[Tensor, Tensor]] = {}  # see :func:`_once`
        self._floats: dict[int, tuple[Tensor, Tensor]] = {}  # cos and sin, see :func:`_once`
        self._causal: Tensor | None = None  # mask of ``rows``, if the model makes none

    def hook(self, layer: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer == self.until:
                raise StopForward
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            cos, sin = (_once(self._floats, t, t.float) for t in kwargs["position_embeddings"])
            view = PlacedLayerView(self.layers, self.kv, layer, (cos, sin))
            self.kv.on_fresh = self.callbacks.after
            hidden = self._narrow(self.callbacks.before(layer, view), hidden)
            if self.callbacks.narrows(layer):
                self._run_to_kv(module, (hidden, *args[1:]), self._reduced(rest))
                hidden = self._narrow(self.callbacks.narrowed(layer), hidden)
            rows = view.all_rows if self.rows is None else self.rows
            self.override.begin_layer(layer, rows, partial=self.rows is not None)
            return (hidden, *args[1:]), self._reduced(rest)

        return before

    def _run_to_kv(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a layer up to its fresh KV, which the callbacks receive. The rest of the layer then
        runs for fewer rows, without calling them again."""
        self.kv.stop_after_kv = True
        try:
            module.forward(*args, **kwargs)
        except StopAfterKV:
            self.kv.on_fresh = None
        finally:
            self.kv.stop_after_kv = False

    def _narrow(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """``hidden`` (1, n, width) of the current rows, reduced to ``rows``, a subset of them."""
        if len(rows) == (self.total if self.rows is None else len(self.rows)):
            return hidden
        rows = rows.to(hidden.device)
        local = rows if self.rows is None else torch.searchsorted(self.rows, rows)
        self.rows = self.kv.rows = rows
        self._selected_rows.clear()
        self._causal = None
        return hidden.index_select(1, local)

    def _reduced(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's other arguments, reduced to the same rows as the hidden states."""
        if self.rows is None:
            return kwargs
        out = dict(kwargs)
        out["position_embeddings"] = tuple(
            self._selected(t, 1) for t in kwargs["position_embeddings"]
        )
        if kwargs.get("position_ids") is not None:
            out["position_ids"] = self._selected(kwargs["position_ids"], 1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            out["attention_mask"] = self._selected(mask, 2)
            return out
        if self._causal is None:  # the model relies on its kernel's causality, as of all rows
            keys = torch.arange(self.total, device=self.rows.device)
            self._causal = (keys[None] <= self.rows[:, None])[None, None]
        out["attention_mask"] = self._causal
        return out

    def _selected(self, tensor: Tensor, dim: int) -> Tensor:
        """The current rows of ``tensor`` along ``dim``."""
        rows = self.rows
        assert rows is not None
        return _once(self._selected_rows, tensor, lambda: tensor.index_select(dim, rows))


def _once(
    results: dict[int, tuple[Tensor, Tensor]], tensor: Tensor, compute: Callable[[], Tensor]
) -> Tensor:
    """The result of ``compute`` for a tensor, cached: many layers receive the same tensor.

    ``results``: by id of a tensor, the tensor, whose reference keeps the id unique, and its result.
    """
    if id(tensor) not in results:
        results[id(tensor)] = tensor, compute()
    return results[id(tensor)][1]


def copy_to_host(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of ``rows`` in host memory, in ``dtype``."""
    return rows.to(device="cpu", dtype=dtype, copy=True).contiguous()
