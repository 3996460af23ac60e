"""RoPE, depth and layers of published checkpoints, one for every supported family.

What is here is written as in their config.json; widths are a few percent of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ragcache.engine.hf.engine import TransformersEngine
from tests import models


@dataclass(frozen=True)
class Family:
    """A checkpoint's configuration, as far as positions and layers go."""

    architecture: str
    head_dim: int
    layers: int
    context: int  # that ragcache is to say
    config: dict[str, Any]
    period: int = 1  # layers after which their kinds begin again
    without: tuple[int, ...] = ()  # layers of a period that have no RoPE

    def model(self, dtype: torch.dtype, layers: int | None = None) -> Any:
        """A random one, narrow, of one period of layers at least, or ``layers``."""
        depth = layers or max(self.period, 4)
        config = {"max_position_embeddings": self.context} | self.config
        if "layer_types" in config:
            config["layer_types"] = (config["layer_types"] * self.layers)[:depth]
        config |= {"num_hidden_layers": depth, "head_dim": self.head_dim}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        made = models.model(self.architecture, hidden_size=2 * self.head_dim, **config)
        for weight in made.parameters():  # buffers stay as they are when a checkpoint is loaded
            weight.data = weight.data.to(dtype)
        return made

    def engine(self, dtype: torch.dtype, layers: int | None = None) -> TransformersEngine:
        return TransformersEngine(
            self.model(dtype, layers), models.tokenizer(), name=self.architecture
        )

    def rotates(self, layers: int) -> list[bool]:
        """Which layers have RoPE."""
        return [layer % self.period not in self.without for layer in range(layers)]

    def one_of_each_kind(self, layers: int) -> list[int]:
        """The last layer of every kind."""
        kinds = self.config.get("layer_types") or [None]
        step = self.config.get("sliding_window_pattern", 0)
        rotates = self.rotates(layers)
        found = {}
        for layer in range(layers):
            kind = kinds[layer % len(kinds)], step and (layer + 1) % step == 0, rotates[layer]
            found[kind] = layer
        return list(found.values())


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

FAMILIES = {
    "Llama-2-7b": Family("llama", 128, 32, 4096, {}),
    "Llama-3.1-8B": Family("llama", 128, 32, 131072, {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
    "Llama-3.2-1B": Family(
        "llama", 64, 16, 131072, {"rope_theta": 5e5, "rope_scaling": _LLAMA3 | {"factor": 32.0}}
    ),
    "SmolLM2-135M linear": Family(
        "llama",
        64,
        30,
        8192,
        {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "Mistral-7B-v0.1": Family(
        "mistral", 128, 32, 32768, {"rope_theta": 1e4, "sliding_window": 4096}
    ),
    "Mistral-Nemo-2407": Family(
        "mistral", 128, 40, 1024000, {"rope_theta": 1e6, "sliding_window": None}
    ),
    "Mixtral-8x7B-v0.1": Family("mixtral", 128, 32, 32768, {"rope_theta": 1e6}),
    "Qwen2.5-7B": Family("qwen2", 128, 28, 32768, {"rope_theta": 1e6}),
    "Qwen2.5-7B YaRN": Family(
        "qwen2",
        128,
        28,
        131072,
        {"rope_theta": 1e6, "rope_scaling": _YARN, "max_position_embeddings": 32768},
    ),
    "Qwen3-8B": Family("qwen3", 128, 36, 40960, {"rope_theta": 1e6}),
    "Qwen3-8B YaRN": Family(
        "qwen3",
        128,
        36,
        131072,
        {"rope_theta": 1e6, "rope_scaling": _YARN, "max_position_embeddings": 40960},
    ),
    "Qwen3-30B-A3B-2507": Family("qwen3_moe", 128, 48, 262144, {"rope_theta": 1e7}),
    "gemma-2-9b": Family(
        "gemma2", 256, 42, 8192, {"rope_theta": 1e4, "sliding_window": 4096}, period=2
    ),
    "gemma-3-270m": Family(
        "gemma3_text", 256, 18, 32768, _GEMMA3 | {"sliding_window": 512}, period=6
    ),
    "gemma-3-4b": Family(
        "gemma3_text",
        256,
        34,
        131072,
        _GEMMA3 | {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        period=6,
    ),
    "phi-2": Family("phi", 80, 32, 2048, {"rope_theta": 1e4, "partial_rotary_factor": 0.4}),
    "phi-4": Family("phi3", 128, 40, 16384, {"rope_theta": 2.5e5}),
    "OLMo-2-1124-7B": Family("olmo2", 128, 32, 4096, {"rope_theta": 5e5}),
    "SmolLM3-3B": Family(
        "smollm3",
        128,
        36,
        65536,
        {"rope_theta": 5e6, "no_rope_layer_interval": 4},
        period=4,
        without=(3,),
    ),
    "granite-3.3-8b": Family(
        "granite",
        128,
        40,
        131072,
        {
            "rope_theta": 1e7,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
        },
    ),
    "c4ai-command-r7b-12-2024": Family(
        "cohere2",
        128,
        32,
        132096,
        {
            "rope_theta": 5e4,
            "sliding_window": 4096,
            "layer_types": [_LOCAL, _LOCAL, _LOCAL, _GLOBAL],
        },
        period=4,
        without=(3,),
    ),
    "GLM-4-9B-0414": Family(
        "glm4", 128, 40, 32768, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gpt-oss-20b": Family(
        "gpt_oss",
        64,
        24,
        131072,
        {
            "rope_theta": 1.5e5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
            "sliding_window": 128,
            "layer_types": [_LOCAL, _GLOBAL],
        },
        period=2,
    ),
    "pythia-6.9b": Family(
        "gpt_neox", 128, 32, 2048, {"rotary_emb_base": 10000, "rotary_pct": 0.25}
    ),
    "stablelm-2-1_6b": Family(
        "stablelm", 64, 24, 4096, {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
    ),
}
