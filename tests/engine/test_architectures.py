"""Fusion through the model's own forward, on every architecture that is claimed to work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf import grouped_attention
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.types import ChunkKV
from tests import models

ARCHITECTURES = [
    "llama",
    "mistral",  # sliding window
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",  # sliding window, soft caps, embedding scale
    "gemma3_text",  # sliding window, RoPE per layer kind
    "phi",  # partial RoPE, sliced outside its function
    "phi3",
    "olmo2",
    "smollm3",  # layers without RoPE
    "granite",
    "cohere2",  # layers without RoPE, interleaved pairs
    "glm4",  # partial RoPE, interleaved pairs
    "gpt_oss",  # YaRN, attention sinks, half-width cos and sin
    "gpt_neox",
    "stablelm",
]
IDS = tuple(range(3, 43))


class FewFromLayer2(PrefillCallbacks):
    """All rows at first, then 8 scattered ones; everything stored is placed beforehand.

    ``inside``: of layer 1, no more than the KV of the others is computed.
    """

    rows = torch.tensor([3, 7, 20, 35, 36, 37, 38, 39])

    def __init__(self, stored: ChunkKV, inside: bool) -> None:
        self.stored, self.inside = stored, inside

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        return torch.arange(40) if layer < 2 else self.rows

    def narrows(self, layer: int) -> bool:
        return self.inside and layer == 1

    def narrowed(self, layer: int) -> Tensor:
        return self.rows


def plain_logits(engine: TransformersEngine, ids: tuple[int, ...]) -> Tensor:
    """The model by itself, without ragcache."""
    with torch.inference_mode():
        logits: Tensor = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.float()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_rows_give_the_models_own_logits(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_attention, "ROWS", 3)
    try:
        engine = models.engine(architecture, attention=attention)
    except ValueError as error:  # transformers refuses SDPA for some architectures
        assert attention == "sdpa" and "scaled_dot_product_attention" in str(error)
        pytest.skip(f"{architecture} has no SDPA")
    assert engine.exposes_attention
    want = plain_logits(engine, IDS)
    stored = engine.encode([IDS])[0]
    torch.testing.assert_close(engine.prefill(IDS).logits, want, atol=1e-4, rtol=1e-4)
    for inside in (False, True):
        got = engine.prefill(IDS, FewFromLayer2(stored, inside)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_come_back_from_other_positions(architecture: str) -> None:
    """encode behind a prefix equals the rows of a whole prefill, keys before RoPE."""
    engine = models.engine(architecture)
    whole = engine.encode([IDS])[0]
    behind = engine.encode([IDS[10:]], behind=IDS[:10])[0]
    for layer in range(engine.spec.layers):
        torch.testing.assert_close(
            behind.keys[layer], whole.keys[layer][:, 10:], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            behind.values[layer], whole.values[layer][:, 10:], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "cohere2", "gpt_oss"])
def test_decode_equals_generate(architecture: str) -> None:
    """Past sliding windows too: 40 prompt tokens and 12 more through windows of 16."""
    from ragcache.types import Sampling

    engine = models.engine(architecture)
    engine.model.generation_config.eos_token_id = None
    engine.tokenizer = _without_eos(engine.tokenizer)
    prompt = torch.tensor([IDS])
    want = engine.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )
    steps = engine.decode(engine.prefill(IDS, room=12), Sampling(max_tokens=12))
    assert [step.token for step in steps] == want[0, 40:].tolist()


def test_bfloat16_stays_close() -> None:
    model = models.model("llama").to(torch.bfloat16)
    engine = TransformersEngine(model, models.tokenizer(), name="llama")
    assert engine.spec.dtype == "bfloat16"
    want, got = plain_logits(engine, IDS), engine.prefill(IDS).logits
    assert (got - want).norm() < 0.05 * want.norm()


def _without_eos(tokenizer: object) -> object:
    import copy

    other = copy.deepcopy(tokenizer)
    other.eos_token = None  # type: ignore[attr-defined]
    return other
