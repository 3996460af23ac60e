"""What each of a model's layers does with its keys, seen during one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf.forward import Forward
from ragcache.engine.hf.layer_hooks import Layers, View
from ragcache.engine.hf.rope import Rope, Rotation, rotations
from ragcache.engine.hf.rope_scaling import unfit
from ragcache.errors import ModelError
from ragcache.types import KVSpec
from ragcache.util.buffer_pool import BufferPool


@torch.inference_mode()
def probe_layers(model: Any, modules: Sequence[nn.Module], name: str) -> tuple[Layers, KVSpec]:
    """Find the KV's shape, and what each of the decoder layers does with its keys, in one forward.

    Raises ModelError for layers that cannot be driven.
    """
    found = Layers(modules, Rope.of(modules[0]), [True] * len(modules))
    forward, ids = Forward(model, found, BufferPool(0)), range(1, 9)
    try:
        with rotations(modules[0]) as calls:
            probe = _Probe(name, calls)
            kv = forward.cache(len(ids))
            with forward.driven(kv, ids, range(len(ids)), probe) as arguments:
                model(**arguments)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(unfit(name, f"its layers cannot be driven ({error})")) from error
    keys = probe.keys
    if len(keys) != len(modules) or len({k.shape for k in keys}) != 1:
        raise ModelError(unfit(name, "its layers do not all keep KV of one shape"))
    rope = probe.rope(found.rope)
    heads, _, dim = keys[0].shape
    dtype = str(keys[0].dtype).removeprefix("torch.")
    layers = Layers(modules, rope, [call is not None for call in probe.calls])
    return layers, KVSpec(len(keys), heads, dim, dtype)


class _Probe(PrefillCallbacks):
    """Computes every row, and notes for each layer the call of the rotary function that made its
    keys. A layer that does not call it has no RoPE: SmolLM3, Cohere2 and others have some.

    Nothing is concluded from how far keys move: a few positions hardly move those of a layer whose
    theta is a million, as in Gemma 3, and no threshold tells it from a layer without RoPE.
    """

    def __init__(self, name: str, going: list[Rotation]) -> None:
        self.name = name
        self.keys: list[Tensor] = []  # per layer, (kv_heads, n, head_dim), after RoPE
        self.calls: list[Rotation | None] = []  # per layer
        self._going = going  # calls since the layer began

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self._going.clear()
        self._angles = cast(View, kv).angles
        return kv.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.calls.append(self._made(layer, keys) if self._going else None)

    def _made(self, layer: int, keys: Tensor) -> Rotation:
        """The call that gave the keys which the layer keeps, at the angles it was handed."""
        for call in self._going:
            given = call.turned.shape[-1]
            angles = zip((call.cos, call.sin), self._angles, strict=True)
            if _same(call.turned, keys[None, ..., :given]) and all(_same(a, b) for a, b in angles):
                return call
        raise ModelError(
            unfit(
                self.name,
                f"layer {layer} changes keys behind its RoPE, or turns them by angles of its own",
            )
        )

    def rope(self, found: Rope) -> Rope:
        """The one way in which all layers that have RoPE apply the function that was found.

        Raises ModelError where there is none, or they do not agree.
        """
        calls = [call for call in self.calls if call is not None]
        if not calls:
            raise ModelError(unfit(self.name, "none of its layers rotates its keys (no RoPE)"))
        ropes = {Rope.seen(found.apply, call, self.keys[0].shape[-1]) for call in calls}
        if len(ropes) > 1:
            raise ModelError(unfit(self.name, "its layers rotate unlike parts of their keys"))
        return ropes.pop()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal to the bit, in the dtype of ``b``; NaN is NaN."""
    return a.shape == b.shape and torch.equal(a.to(b.dtype).nan_to_num(), b.nan_to_num())
