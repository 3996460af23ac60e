"""The importance of keys and values is what noise in them does to predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.kv_importance import kv_importance
from tests import models

TEXT = "Mira Holt keeps a parrot. She plays the cello and lives by the sea. " * 6


class Noisy(DynamicCache):
    """Adds noise of a standard deviation to the keys (0) or values (1) of one layer."""

    def __init__(self, layer: int, kind: int, size: float, seed: int) -> None:
        super().__init__()
        self.place, self.size, self.seed = (layer, kind), size, seed

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        pair = [key_states, value_states]
        layer, kind = self.place
        if layer == layer_idx:
            noise = torch.randn(
                pair[kind].shape, generator=torch.Generator().manual_seed(self.seed)
            )
            pair[kind] = pair[kind] + self.size * noise
        return pair[0], pair[1]


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model_dir), device="cpu", dtype="float32")


@torch.inference_mode()
def chances(engine: TransformersEngine, ids: Tensor, cache: DynamicCache) -> Tensor:
    logits = engine.model(ids, past_key_values=cache, use_cache=True).logits
    found: Tensor = logits[0].double().log_softmax(-1)
    return found


def test_it_predicts_the_divergence_that_noise_makes(engine: TransformersEngine) -> None:
    """KL, summed over tokens, of noise of variance v in each of n numbers: n v / 2 times it."""
    tokens = tuple(engine.tokenize(TEXT))
    found = kv_importance(engine.model, [tokens] * 12)  # other tokens are drawn each time
    ids, size = torch.tensor([tokens]), 0.02
    clean = chances(engine, ids, Noisy(0, 0, 0.0, 0))
    for layer, kind in ((0, 0), (5, 0), (5, 1), (10, 1)):
        kls = []
        for seed in range(8):
            noisy = chances(engine, ids, Noisy(layer, kind, size, seed))
            kls.append(float((clean.exp() * (clean - noisy)).sum()))
        spec = engine.spec
        numbers = len(tokens) * spec.kv_heads * spec.head_dim
        expected = found[layer][kind] * numbers * size**2 / 2
        assert sum(kls) / len(kls) == pytest.approx(expected, rel=0.4)


def test_it_leaves_the_model_as_it_was(engine: TransformersEngine) -> None:
    weights = {name: weight.requires_grad for name, weight in engine.model.named_parameters()}
    tokens = tuple(engine.tokenize(TEXT))
    first = kv_importance(engine.model, [tokens])
    assert first == kv_importance(engine.model, [tokens])  # the same tokens are drawn
    assert all(value > 0 for pair in first for value in pair)
    assert weights == {n: w.requires_grad for n, w in engine.model.named_parameters()}
    assert all(weight.grad is None for weight in engine.model.parameters())
    [kv] = engine.encode([tokens])
    assert not kv.keys[0].requires_grad


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "phi3"])
def test_other_architectures(family: str) -> None:
    engine = models.engine(family)
    found = kv_importance(engine.model, [tuple(range(3, 40))])
    assert len(found) == engine.spec.layers
    assert all(value >= 0 for pair in found for value in pair)
