"""Find out, in one forward, which of a model's layers have RoPE and how they apply it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf.forward import Forward
from ragcache.engine.hf.layer_hooks import DecoderLayers, PlacedLayerView
from ragcache.engine.hf.rope import Rope, RotaryCall, record_rotary_calls
from ragcache.engine.hf.rope_scaling import unsupported_model
from ragcache.errors import ModelError
from ragcache.types import KVSpec
from ragcache.util.buffer_pool import BufferPool


@torch.inference_mode()
def probe_layers(
    model: Any, modules: Sequence[nn.Module], name: str
) -> tuple[DecoderLayers, KVSpec]:
    """The decoder layers with their RoPE, and the shape of their KV.

    Raises ModelError if the layers cannot be driven, do not have RoPE, apply it in different ways,
    or have KV of different shapes.
    """
    found = DecoderLayers(modules, Rope.of(modules[0]), [True] * len(modules))
    forward, ids = Forward(model, found, BufferPool(0)), range(1, 9)
    try:
        with record_rotary_calls(modules[0]) as calls:
            probe = _Probe(name, calls)
            kv = forward.cache(len(ids))
            with forward.driven(kv, ids, range(len(ids)), probe) as arguments:
                model(**arguments)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            unsupported_model(name, f"its layers cannot be driven ({error})")
        ) from error
    keys = probe.keys
    if len(keys) != len(modules) or len({k.shape for k in keys}) != 1:
        raise ModelError(unsupported_model(name, "its layers do not all keep KV of one shape"))
    rope = probe.rope(found.rope)
    heads, _, dim = keys[0].shape
    dtype = str(keys[0].dtype).removeprefix("torch.")
    layers = DecoderLayers(modules, rope, [call is not None for call in probe.calls])
    return layers, KVSpec(len(keys), heads, dim, dtype)


class _Probe(PrefillCallbacks):
    """Computes every row, and records the call of the rotary function that made each layer's keys.

    A layer that does not call the function has no RoPE; SmolLM3, Cohere2 and others have such
    layers. The values of keys do not show it: with a theta of a million, as in Gemma 3, RoPE hardly
    changes the keys at the first positions.
    """

    def __init__(self, name: str, recorded: list[RotaryCall]) -> None:
        self.name = name
        self.keys: list[Tensor] = []  # per layer, (kv_heads, n, head_dim), after RoPE
        self.calls: list[RotaryCall | None] = []  # per layer
        self._recorded = recorded  # calls since the current layer began

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self._recorded.clear()
        self._angles = cast(PlacedLayerView, kv).angles
        return kv.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.calls.append(self._call_of(layer, keys) if self._recorded else None)

    def _call_of(self, layer: int, keys: Tensor) -> RotaryCall:
        """The call that returned the layer's keys, with the layer's own cos and sin."""
        for call in self._recorded:
            width = call.rotated.shape[-1]
            angles = zip((call.cos, call.sin), self._angles, strict=True)
            if _same(call.rotated, keys[None, ..., :width]) and all(_same(a, b) for a, b in angles):
                return call
        raise ModelError(
            unsupported_model(
                self.name,
                f"layer {layer} changes keys after its RoPE, or rotates them by angles of its own",
            )
        )

    def rope(self, found: Rope) -> Rope:
        """How all layers with RoPE apply the rotary function of ``found``.

        Raises ModelError if no layer has RoPE, or two layers apply it in different ways.
        """
        calls = [call for call in self.calls if call is not None]
        if not calls:
            raise ModelError(
                unsupported_model(self.name, "none of its layers rotates its keys (no RoPE)")
            )
        ropes = {Rope.from_call(found.apply, call, self.keys[0].shape[-1]) for call in calls}
        if len(ropes) > 1:
            raise ModelError(
                unsupported_model(self.name, "its layers rotate different parts of their keys")
            )
        return ropes.pop()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are equal bit for bit in the dtype of ``b``. NaN equals NaN."""
    return a.shape == b.shape and torch.equal(a.to(b.dtype).nan_to_num(), b.nan_to_num())
