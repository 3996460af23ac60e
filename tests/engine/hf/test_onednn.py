"""Linear layers and attention with oneDNN: torch's numbers and gradients, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ragcache.engine.hf import grouped_attention, onednn
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.grouped_attention import GroupedAttention
from ragcache.engine.hf.onednn import SDPA, use_onednn
from tests import models

SHAPES = [(1, 2400), (300,), (1, 1, 37), (2, 700)]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU on which oneDNN is faster."""
    if not torch._C._has_mkldnn:
        pytest.skip("this torch has no oneDNN")
    for module in (onednn, grouped_attention):
        monkeypatch.setattr(module, "is_faster", lambda: True)


def change(*layers: nn.Module) -> None:
    """Call ``use_onednn`` with a model that has these layers."""
    model = models.model("llama", attention="sdpa")
    model.added = nn.ModuleList(layers)
    assert use_onednn(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_gives_the_same_as_in_torch(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain, rows = nn.Linear(96, 480, bias=bias), torch.randn(*shape, 96)
    with torch.inference_mode():
        double = plain.bias.double() if bias else None
        wanted = nn.functional.linear(rows.double(), plain.weight.double(), double)
        change(plain)
        got = plain(rows)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous() -> None:
    plain, rows = nn.Linear(64, 512), torch.randn(64, 900).T
    assert not rows.is_contiguous()
    with torch.inference_mode():
        wanted = plain(rows)
        change(plain)
        torch.testing.assert_close(plain(rows), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_torch() -> None:
    plain, rows = nn.Linear(128, 256), torch.randn(400, 128)
    plain(rows).square().sum().backward()
    wanted, plain.weight.grad = plain.weight.grad, None
    change(plain)
    plain(rows).square().sum().backward()
    assert wanted is not None and plain.weight.grad is not None
    torch.testing.assert_close(plain.weight.grad, wanted)


def test_only_layers_of_torch_itself_change_and_weights_stay() -> None:
    class Own(nn.Linear):
        pass

    layers = nn.Linear(8, 8), Own(8, 8)
    weights = [layer.weight for layer in layers]
    change(*layers)
    assert [type(layer).__name__ for layer in layers] == ["_OneDNNLinear", "Own"]
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))


def test_16_bit_models_stay_as_they_are() -> None:
    model = models.model("llama", attention="sdpa").to(torch.bfloat16)
    assert not use_onednn(model) and model.config._attn_implementation == "sdpa"
    assert not any(isinstance(layer, onednn._OneDNNLinear) for layer in model.modules())


def qkv(rows: int, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return (
        torch.randn(1, heads, rows, 32),
        torch.randn(1, kv_heads, keys, 32),
        torch.randn(1, kv_heads, keys, 32),
    )


def masks(rows: int, keys: int) -> dict[str, Tensor | None]:
    at = torch.arange(keys - rows, keys)[:, None]
    causal = torch.arange(keys) <= at
    window = causal & (torch.arange(keys) > at - 50)
    added = torch.zeros(rows, keys).masked_fill(~window, torch.finfo(torch.float32).min)
    found: dict[str, Tensor | None] = {"bool": causal, "window": window, "added": added}
    given = {name: mask[None, None] for name, mask in found.items() if mask is not None}
    return given | ({"none": None} if rows == keys else {})


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (129, 129), (40, 333), (1, 200), (5, 5)])
def test_attention_gives_the_same_as_in_torch(
    heads: int, kv_heads: int, rows: int, keys: int
) -> None:
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    query, key, value = qkv(rows, keys, heads, kv_heads)
    for name, mask in masks(rows, keys).items():
        with torch.inference_mode():
            wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
            got, _ = onednn._attention(module, query, key, value, mask, scaling=0.2)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_attention_of_some_rows_gives_the_same_as_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = qkv(150, 1000, 6, 2)
    rows = torch.randperm(1000)[:150].sort().values
    mask = (torch.arange(1000) <= rows[:, None])[None, None]
    with torch.inference_mode():
        got = GroupedAttention(rows).sdpa(query, key, value, mask, None)
        monkeypatch.setattr(grouped_attention, "is_faster", lambda: False)
        wanted = GroupedAttention(rows).sdpa(query, key, value, mask, None)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_that_see_no_key_are_zero() -> None:
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = qkv(300, 300, 4, 2)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    mask[..., :9] = False  # as of a prompt that is padded on the left
    with torch.inference_mode():
        wanted, _ = sdpa_attention_forward(module, query, key, value, mask)
        got, _ = onednn._attention(module, query, key, value, mask)
    assert not got[0, :9].any()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_heads_that_are_not_contiguous() -> None:
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = (plane.transpose(1, 2).contiguous() for plane in qkv(300, 300, 4, 2))
    with torch.inference_mode():
        strided = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        assert not strided[1][0, 0].is_contiguous()
        wanted, _ = sdpa_attention_forward(module, *strided, None)
        got, _ = onednn._attention(module, *strided, None)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "extra", [{"is_causal": False}, {"position_bias": torch.ones(1, 4, 300, 300).tril()}]
)
def test_what_it_is_not_made_for_goes_to_transformers(extra: dict[str, Any]) -> None:
    module = nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    query, key, value = qkv(300, 300, 4, 4)
    with torch.inference_mode():
        wanted, _ = sdpa_attention_forward(module, query, key, value, None, **extra)
        got, _ = onednn._attention(module, query, key, value, None, **extra)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen2"])
def test_a_model_computes_the_same_and_has_the_same_fingerprint(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    tokens = tuple(range(3, 200))
    made = TransformersEngine(models.model(architecture, attention="sdpa"), models.tokenizer())
    assert made.model.get_decoder().config._attn_implementation == SDPA[1]
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    plain = TransformersEngine(models.model(architecture, attention="sdpa"), models.tokenizer())
    assert plain.model.get_decoder().config._attn_implementation == SDPA[0]
    assert made.fingerprint == plain.fingerprint
    got, wanted = made.prefill(tokens).logits, plain.prefill(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "wide", "faster"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False)]
    + [("AuthenticAMD", "AVX2", False), ("", "AVX512", False)],
)
def test_it_is_chosen_by_what_the_cpu_is(
    monkeypatch: pytest.MonkeyPatch, vendor: str, wide: str, faster: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wide)
    assert onednn.is_faster.__wrapped__() == (faster and torch._C.has_mkl)
