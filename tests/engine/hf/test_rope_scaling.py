"""The longest prompt, for configurations as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.model_info import ModelInfo
from ragcache.engine.hf.rope_scaling import context_tokens
from ragcache.errors import ContextError
from tests import models

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FROM_8K = {"original_max_position_embeddings": 8192}


def configuration(architecture: str, **said: Any) -> Any:
    kind: Any = CONFIG_MAPPING[architecture]
    return kind(**said)


@pytest.mark.parametrize(
    ("said", "scaling", "want"),
    [
        (8192, {}, 8192),
        (8192, YARN | FROM_8K, 32768),  # unchanged, as Qwen's cards advise
        (8192, YARN, 32768),  # transformers stretches from what is said
        (32768, YARN | FROM_8K, 32768),  # the factor is in it, as in gpt-oss
        (40960, YARN | {"original_max_position_embeddings": 32768}, 131072),  # Qwen3
        (40960, YARN | FROM_8K, 40960),  # said to be longer than what is stretched
        (131072, LLAMA3 | FROM_8K | {"factor": 8.0}, 131072),  # Llama 3.1
        (131072, LLAMA3 | FROM_8K | {"factor": 32.0}, 131072),  # Llama 3.2: not 262,144
        (16384, {"rope_type": "linear", "factor": 4.0}, 16384),  # DeepSeek Coder
    ],
)
def test_context(said: int, scaling: dict[str, Any], want: int) -> None:
    config = configuration(
        "llama", max_position_embeddings=said, rope_theta=1e4, rope_scaling=dict(scaling) or None
    )
    assert context_tokens(config) == want


def test_context_of_kinds_of_layers() -> None:
    """Gemma 3's linear factor is in what it says."""
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    config = configuration(
        "gemma3_text",
        max_position_embeddings=131072,
        rope_parameters={"full_attention": linear, "sliding_attention": local},
    )
    assert context_tokens(config) == 131072
    config.rope_parameters["full_attention"] = YARN | {
        "rope_theta": 1e6,
        "original_max_position_embeddings": 65536,
    }
    assert context_tokens(config) == 262144


def test_context_of_a_model_with_more_than_text() -> None:
    config = configuration("gemma3", text_config={"max_position_embeddings": 4096})
    assert context_tokens(config) == 4096


def test_every_door_names_the_stretched_context(tmp_path: Path) -> None:
    model = models.model("llama", rope_scaling=YARN | {"original_max_position_embeddings": 512})
    model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    engine = TransformersEngine.load(tmp_path)
    assert engine.context_tokens == ModelInfo.of(str(tmp_path), "float32").context_tokens == 2048
    engine.prefill(tuple(range(3, 403)) * 5)
    with pytest.raises(ContextError, match="has a context of 2048"):
        engine.prefill(tuple(range(3, 403)) * 6)
