"""Fusion through the model's own forward, on every supported architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ragcache.engine.base import Engine
from ragcache.engine.hf import grouped_attention
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.testing.engine import IDS, EngineTests
from ragcache.types import Sampling, Tokens
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


def plain_logits(engine: TransformersEngine, ids: Tokens) -> Tensor:
    """The model by itself, without ragcache."""
    with torch.inference_mode():
        logits: Tensor = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.float()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows attend in groups of 3, so that these prompts need several."""
    monkeypatch.setattr(grouped_attention, "_ROWS", 3)


class TestEveryArchitecture(EngineTests):
    @pytest.fixture(
        scope="class",
        params=[(name, kind) for name in ARCHITECTURES for kind in ("sdpa", "eager")],
        ids="-".join,
    )
    @classmethod
    def engine(cls, request: pytest.FixtureRequest) -> TransformersEngine:
        architecture, attention = request.param
        try:
            made = models.engine(architecture, attention=attention)
        except ValueError as error:  # transformers refuses SDPA for some architectures
            assert attention == "sdpa" and "scaled_dot_product_attention" in str(error)
            pytest.skip(f"{architecture} has no SDPA")
        assert made.exposes_attention
        return made

    def forward(self, engine: Engine, tokens: Tokens) -> Tensor:
        assert isinstance(engine, TransformersEngine)
        return plain_logits(engine, tokens)


class TestPackagedModel(EngineTests):
    """Its tokenizer puts a space before any text, as those of SentencePiece do."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> TransformersEngine:
        return TransformersEngine.load(model_path(TINY), dtype="float32")

    def forward(self, engine: Engine, tokens: Tokens) -> Tensor:
        assert isinstance(engine, TransformersEngine)
        return plain_logits(engine, tokens)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "cohere2", "gpt_oss"])
def test_decode_equals_generate(architecture: str) -> None:
    """Past sliding windows too: 40 prompt tokens and 12 more through windows of 16."""
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
    other = copy.deepcopy(tokenizer)
    other.eos_token = None  # type: ignore[attr-defined]
    return other
