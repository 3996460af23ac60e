"""Keys are rotated as the model rotates them, in every layer, anywhere in the context.

At the theta, scaling, layer kinds and context of published checkpoints, in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as half_width
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as by_halves

from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf import layer_hooks
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.forward import Forward
from ragcache.engine.hf.rope import Rope, RotaryCall, RotaryFunction, record_rotary_calls
from ragcache.engine.hf.rope_probe import _Probe
from ragcache.engine.self_test import check_engine
from ragcache.errors import ModelError
from ragcache.types import ChunkKV, KVPair
from tests import models
from tests.families import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Of a key's norm: what rounding does to it, in the model and on the way through the store.
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-2}
TOKEN = 77


class Placed(PrefillCallbacks):
    """Places the KV of one token and keeps its keys as they are then."""

    def __init__(self, stored: ChunkKV) -> None:
        self.stored = stored
        self.keys: list[Tensor] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        self.keys.append(kv.read(torch.arange(1))[0])
        return torch.arange(1)


def own_keys(engine: TransformersEngine, position: int) -> list[Tensor]:
    """Keys (kv_heads, 1, head_dim) of every layer, from the model without ragcache."""
    with torch.inference_mode():
        out = engine.model(torch.tensor([[TOKEN]]), position_ids=torch.tensor([[position]]))
    return [layer.keys[0] for layer in out.past_key_values.layers]


def keys_stay_the_models(engine: TransformersEngine) -> None:
    """A token's stored keys, placed anywhere, are those of the model, layer by layer.

    Without sinks, so that nothing but keys depends on where a token stands that is by itself.
    """
    for name, weight in engine.model.named_parameters():
        if name.endswith("sinks"):
            weight.data.fill_(-1e4)
    stored = engine.encode([(TOKEN,)])[0]
    end = engine.context_tokens - 2
    for position in (5, min(7919, end // 2), end):
        callbacks = Placed(stored)
        engine.prefill((TOKEN,), callbacks, positions=[position])
        for layer, want in enumerate(own_keys(engine, position)):
            assert off(callbacks.keys[layer], want) <= ROUNDING[engine.spec.dtype], (
                layer,
                position,
            )


def off(got: Tensor, want: Tensor) -> float:
    """The largest error of a head's key, relative to its norm."""
    error = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
    return float(error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_every_family_at_its_own_angles(checkpoint: str, dtype: str) -> None:
    family = FAMILIES[checkpoint]
    engine = family.engine(DTYPES[dtype])
    assert engine._forward.layers.rotates == family.rotates(engine.spec.layers)
    assert engine.context_tokens == family.context
    keys_stay_the_models(engine)
    for layer in family.one_of_each_kind(engine.spec.layers):
        one_wrong_layer_is_refused(engine, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "checkpoint", ["gemma-3-270m", "gemma-3-4b", "SmolLM2-135M linear", "granite-3.3-8b"]
)
def test_keys_that_hardly_turn(checkpoint: str, dtype: str) -> None:
    """Trained keys have most of their norm where RoPE is slow: in the last pairs of dimensions.

    Seven positions turn those of a global layer by less than a twentieth of their norm.
    """
    model = FAMILIES[checkpoint].model(DTYPES[dtype])
    for layer in model.model.layers:
        slow_keys(layer.self_attn)
    engine = TransformersEngine(model, models.tokenizer(), name=checkpoint)
    near, far = own_keys(engine, 0), own_keys(engine, 7)
    assert min(map(off, near, far)) < 0.05
    assert all(engine._forward.layers.rotates)
    keys_stay_the_models(engine)
    for layer in FAMILIES[checkpoint].one_of_each_kind(engine.spec.layers):
        one_wrong_layer_is_refused(engine, layer)


def slow_keys(attention: Any) -> None:
    """Leave a hundredth of the keys' faster three quarters, both halves of every pair."""
    pairs = torch.arange(attention.head_dim) % (attention.head_dim // 2)
    scale = torch.where(pairs < 3 * attention.head_dim // 8, 0.01, 1.0)
    with torch.no_grad():
        if hasattr(attention, "k_norm"):
            attention.k_norm.weight.copy_(scale - 1)  # Gemma's norms multiply by 1 + weight
        else:
            attention.k_proj.weight.mul_(
                scale.repeat(len(attention.k_proj.weight) // len(scale))[:, None]
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_every_family_at_its_own_depth(checkpoint: str, dtype: str) -> None:
    """Takes a minute or two: up to 48 layers, 50 models."""
    family = FAMILIES[checkpoint]
    engine = family.engine(DTYPES[dtype], family.layers)
    assert engine._forward.layers.rotates == family.rotates(family.layers)
    keys_stay_the_models(engine)


def one_wrong_layer_is_refused(engine: TransformersEngine, layer: int) -> None:
    """One that is not turned, or is though it should not be, or at another kind's angles."""
    right = engine._forward
    flipped = [turns != (at == layer) for at, turns in enumerate(right.layers.rotates)]
    engine._forward = replace(right, layers=replace(right.layers, rotates=flipped))
    refused(engine, layer)
    engine._forward = right
    if not right.layers.rotates[layer]:
        return
    for inv_freq, scale in wrong_angles(engine, layer):
        with placed_at_other_angles(engine, layer, inv_freq, scale):
            refused(engine, layer)


def refused(engine: TransformersEngine, layer: int) -> None:
    with pytest.raises(ModelError, match=f"the keys of layer {layer} cannot be moved"):
        check_engine(engine, 512, engine.context_tokens)


def wrong_angles(engine: TransformersEngine, layer: int) -> Iterator[tuple[Tensor, float]]:
    """Frequencies that are not the layer's, and factors of cos and sin that are not."""
    rotary = engine.model.get_decoder().rotary_emb
    config = engine.model.config
    kinds = getattr(rotary, "layer_types", None)  # where each has its own
    if kinds is None:
        own, factor = rotary.inv_freq, rotary.attention_scaling
        parameters = config.rope_parameters
    else:
        kind = config.layer_types[layer]
        own, factor = getattr(rotary, f"{kind}_inv_freq"), 1.0
        parameters = config.rope_parameters[kind]
        yield from ((getattr(rotary, f"{k}_inv_freq"), 1.0) for k in kinds if k != kind)
    steps = torch.arange(len(own)) / len(own)
    plain = parameters["rope_theta"] ** -steps
    yield (plain if parameters["rope_type"] != "default" else own / 2), factor
    if factor != 1.0:
        yield own, 1.0


@contextmanager
def placed_at_other_angles(
    engine: TransformersEngine, broken: int, inv_freq: Tensor, scale: float
) -> Iterator[None]:
    """While this lasts, the keys of one layer are placed by other frequencies than the model's."""
    driven: Any = Forward.driven
    at: list[Tensor] = []

    def noting(
        forward: Forward, kv: Any, tokens: Any, positions: Any, *args: Any, **kw: Any
    ) -> Any:
        at[:] = [torch.tensor(positions)[None, :, None]]
        return driven(forward, kv, tokens, positions, *args, **kw)

    def place(view: layer_hooks.PlacedLayerView, start: int, parts: list[KVPair]) -> None:
        right = view._cos, view._sin
        if view._layer == broken:
            angles, copies = at[0] * inv_freq, right[0].shape[-1] // len(inv_freq)
            in_pairs = torch.equal(right[0][..., ::2], right[0][..., 1::2])
            angles = (
                angles.repeat_interleave(copies, -1) if in_pairs else angles.repeat(1, 1, copies)
            )
            view._cos, view._sin = scale * angles.cos(), scale * angles.sin()
        own(view, start, parts)
        view._cos, view._sin = right

    own = layer_hooks.PlacedLayerView.place
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "driven", noting)
        patch.setattr(layer_hooks.PlacedLayerView, "place", place)
        yield


def turned_in_halves(apply: RotaryFunction, dim: int, rotary: int) -> bool:
    keys, cos = torch.zeros(1, 2, 3, dim), torch.zeros(1, 3, rotary)
    return Rope.from_call(apply, RotaryCall(keys, cos, cos, keys), dim).halves


def test_halves_are_told_from_pairs() -> None:
    assert turned_in_halves(by_halves, 16, 16)
    assert not turned_in_halves(interleaved, 16, 16)
    assert not turned_in_halves(half_width, 16, 8)


def test_a_function_that_is_all_but_the_same_is_not_taken_for_it() -> None:
    def almost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = by_halves(q, k, cos, sin)
        return q, k + 1e-7 * k.square()

    assert not turned_in_halves(almost, 16, 16)


def test_the_function_is_put_back() -> None:
    model = models.model("llama")
    layer = model.model.layers[0]
    before = Rope.of(layer).apply
    with record_rotary_calls(layer) as calls:
        model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 4 and Rope.of(layer).apply is before
    assert calls[0].keys.shape == calls[0].rotated.shape == (1, 2, 3, 16)


def test_a_rotary_function_of_another_kind_is_refused() -> None:
    class Layer(nn.Module):  # Gemma 3n turns queries and keys by calls of their own
        __module__ = modeling_gemma3n.__name__

    with pytest.raises(ModelError, match=r"no apply_rotary_pos_emb\(q, k, cos, sin\)"):
        Rope.of(Layer())


def test_keys_that_are_changed_behind_rope_are_refused() -> None:
    """HunYuan normalises keys when they have turned."""
    with pytest.raises(ModelError, match="layer 0 changes keys after its RoPE"):
        models.engine("hunyuan_v1_dense")


def test_angles_of_a_layers_own_are_refused() -> None:
    model = models.model("llama")
    attention = model.model.layers[2].self_attn

    def other(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (sin, cos)}

    attention.register_forward_pre_hook(other, with_kwargs=True)
    with pytest.raises(ModelError, match="layer 2 .* rotates them by angles of its own"):
        TransformersEngine(model, models.tokenizer(), name="llama")


def test_layers_that_turn_unlike_parts_are_refused() -> None:
    probe = _Probe("odd", [])
    for dim in (8, 16):
        keys, cos = torch.zeros(1, 2, 3, dim), torch.zeros(1, 3, dim)
        probe.keys.append(torch.zeros(1, 2, 3, 16))
        probe.calls.append(RotaryCall(keys, cos, cos, keys))
    with pytest.raises(ModelError, match="different parts of their keys"):
        probe.rope(Rope(by_halves))


def test_layers_that_do_not_call_it_at_all_are_refused() -> None:
    with pytest.raises(ModelError, match="none of its layers rotates its keys"):
        models.engine("smollm3", no_rope_layers=[0] * 4)
