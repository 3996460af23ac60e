"""Models with random weights, and prompts for them: times do not depend on the values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.types import Prompt

CHUNKS = 8
VOCABULARY = 2048  # that of the tokenizer, which is the small model's
LONGEST = 65536

#: name -> model class, configuration class, and the shape
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-110m": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2.5-0.5b": (
        Qwen2,
        Qwen2Config,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "llama-3.1-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}


def engine(
    dtype: torch.dtype, shape: str = "llama-110m", device: str = "cpu"
) -> TransformersEngine:
    """A random model of a shape, without its vocabulary, with the small model's tokenizer."""
    torch.manual_seed(0)
    model, config, sizes = SHAPES[shape]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(TINY))
    with torch.device(device):
        made = model(
            config(**sizes, vocab_size=VOCABULARY, max_position_embeddings=LONGEST, dtype=dtype)
        )
    return TransformersEngine(made.to(dtype), tokenizer, name=shape)


def prompt(tokens: int, generator: torch.Generator) -> Prompt:
    """Random ids: 16 of prefix, eight chunks, 32 of question."""
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()
    each = (tokens - 48) // CHUNKS
    chunks = tuple(tuple(ids[16 + i * each : 16 + (i + 1) * each]) for i in range(CHUNKS))
    return Prompt.of(tuple(ids[:16]), chunks, tuple(ids[-32:]))
