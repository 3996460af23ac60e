"""Hooks that let callbacks drive a model's own layers, for the length of one forward."""

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

_SMALL_BYTES = 128 << 10  # of keys


@dataclass(frozen=True)
class Layers:
    """A model's decoder layers, and how each of them rotates its keys."""

    modules: Sequence[nn.Module]
    rope: Rope
    rotates: Sequence[bool]  # some architectures have layers without RoPE
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
        """While this lasts, a forward over ``total`` rows computes those that ``callbacks`` name.

        ``override`` is told of every layer before it is computed. The forward ends with
        :class:`StopForward` in front of layer ``until``.
        """
        cutter = _Cutter(self, kv, callbacks, total, override, until)
        handles = [
            module.register_forward_pre_hook(cutter.hook(index), with_kwargs=True)
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


class Capture(PrefillCallbacks):
    """Computes every row and keeps every layer's fresh KV, keys before RoPE."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # per layer, (kv_heads, n, head_dim)
        self.values: list[Tensor] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = cast(View, kv)
        return kv.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys.append(self.view.unrotate(keys))
        self.values.append(values)


class View:
    """A LayerView: one layer's buffers with that layer's own cos and sin."""

    def __init__(
        self, layers: Layers, kv: PlacedKV, layer: int, angles: tuple[Tensor, Tensor]
    ) -> None:
        self._rope = layers.rope if layers.rotates[layer] else None
        self._kv, self._layer = kv, layer
        self._by_kernel = layers.kernels.place
        self.angles = self._cos, self._sin = angles  # (1, rows, rotary_dim), float32
        self.all_rows = torch.arange(angles[0].shape[1], device=angles[0].device)

    def place(self, start: int, parts: Sequence[KVPair]) -> None:
        if not parts:
            return
        here = [(self._moved(keys), self._moved(values)) for keys, values in parts]
        k, v = self._kv.allocated(self._layer, (here[0][0][None], here[0][1][None]))
        span = slice(start, start + sum(keys.shape[1] for keys, _ in here))
        angles = None if self._rope is None else (self._cos[0, span], self._sin[0, span])
        out = k[0, :, span], v[0, :, span]
        if self._by_kernel is not None:
            self._by_kernel(here, angles, out)
        else:
            place_by_torch(self._rope, _few(here), angles, out)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._cos.device, non_blocking=True)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._kv.buffers(self._layer)
        rows = rows.to(k.device)
        return k[0].index_select(1, rows), v[0].index_select(1, rows)

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = (t[0, :, start:stop] for t in self._kv.buffers(self._layer))
        return on_host(self.unrotate(k, start), v.dtype), on_host(v, v.dtype)

    def unrotate(self, keys: Tensor, start: int = 0) -> Tensor:
        """Keys of the rows from ``start`` on, (kv_heads, n, head_dim), before RoPE."""
        if self._rope is None:
            return keys
        span = slice(start, start + keys.shape[1])
        return self._rope.unrotate(keys[None], self._cos[:, span], self._sin[:, span])[0]


class _Cutter:
    """Pre-hooks that cut a layer's inputs down to the rows that callbacks name."""

    def __init__(
        self,
        layers: Layers,
        kv: PlacedKV,
        callbacks: PrefillCallbacks,
        total: int,
        override: AttentionOverride,
        until: int | None,
    ) -> None:
        self.layers, self.kv, self.callbacks, self.total = layers, kv, callbacks, total
        self.override, self.until = override, until
        self.rows: Tensor | None = None  # that hidden states are of; None: of all
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}  # by id: what was cut, and to what
        self._floats: dict[int, tuple[Tensor, Tensor]] = {}  # the same of cos and sin
        self._causal: Tensor | None = None

    def hook(self, layer: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer == self.until:
                raise StopForward
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            cos, sin = (_once(self._floats, t, t.float) for t in kwargs["position_embeddings"])
            view = View(self.layers, self.kv, layer, (cos, sin))
            self.kv.on_fresh = self.callbacks.after
            hidden = self._narrow(self.callbacks.before(layer, view), hidden)
            if self.callbacks.narrows(layer):
                self._run_to_kv(module, (hidden, *args[1:]), self._cut(rest))
                hidden = self._narrow(self.callbacks.narrowed(layer), hidden)
            every = view.all_rows if self.rows is None else self.rows
            self.override.at(layer, every, cut=self.rows is not None)
            return (hidden, *args[1:]), self._cut(rest)

        return before

    def _run_to_kv(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a layer until its fresh KV is known, and its driver was told; the rest of it, which
        will be run for fewer rows, does not tell again."""
        self.kv.ends_there = True
        try:
            module.forward(*args, **kwargs)
        except StopAfterKV:
            self.kv.on_fresh = None
        finally:
            self.kv.ends_there = False

    def _narrow(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """``hidden``, which holds the rows so far, cut down to ``rows``: a subset of them."""
        if len(rows) == (self.total if self.rows is None else len(self.rows)):
            return hidden
        rows = rows.to(hidden.device)
        local = rows if self.rows is None else torch.searchsorted(self.rows, rows)
        self.rows = self.kv.rows = rows
        self._cuts.clear()
        self._causal = None
        return hidden.index_select(1, local)

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer is given beside hidden states, cut down to the same rows."""
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
        if self._causal is None:  # the model left causality to its kernel: say it for these rows
            every = torch.arange(self.total, device=self.rows.device)
            self._causal = (every[None] <= self.rows[:, None])[None, None]
        out["attention_mask"] = self._causal
        return out

    def _selected(self, whole: Tensor, dim: int) -> Tensor:
        """The rows of one tensor."""
        rows = self.rows
        assert rows is not None
        return _once(self._cuts, whole, lambda: whole.index_select(dim, rows))


def _once(
    made: dict[int, tuple[Tensor, Tensor]], given: Tensor, make: Callable[[], Tensor]
) -> Tensor:
    """What ``make`` makes of a tensor, made once: layers are given the same ones again and again.

    ``made``: by id, what it was made of, which keeps the id its own, and what it became.
    """
    if id(given) not in made:
        made[id(given)] = given, make()
    return made[id(given)][1]


def _few(parts: Sequence[KVPair]) -> Iterator[KVPair]:
    """The same KV in fewer parts: small ones are joined, for each costs some calls."""
    at = 0
    while at < len(parts):
        end, size = at + 1, parts[at][0].nbytes
        while end < len(parts) and size < _SMALL_BYTES:
            size += parts[end][0].nbytes
            end += 1
        if end == at + 1:
            yield parts[at]
        else:
            keys, values = zip(*parts[at:end], strict=True)
            yield torch.cat(keys, 1), torch.cat(values, 1)
        at = end


def on_host(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in host memory."""
    return rows.to(device="cpu", dtype=dtype, copy=True).contiguous()
