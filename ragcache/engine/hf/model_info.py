"""Describe a model without running it, for use when another process runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ragcache.engine.decode import end_tokens
from ragcache.engine.hf.fingerprint import cached_weights_digest, fingerprint
from ragcache.engine.hf.loading import build_without_weights, load_model, load_tokenizer
from ragcache.engine.hf.rope_scaling import context_tokens
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.memory import ensure_unchanged
from ragcache.types import Fingerprint, KVSpec

__all__ = ["ModelInfo", "kv_spec"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's shape and fingerprint. Equal fingerprints mean interchangeable KV."""

    tokenizer: Any
    spec: KVSpec
    fingerprint: Fingerprint
    context_tokens: int
    parameters: int  # how many weights
    heads: int  # query heads of a layer
    ends: frozenset[int]  # tokens that end an answer

    @classmethod
    def of(cls, name: str, dtype: str, codec: str = "raw") -> ModelInfo:
        """The info of a folder, GGUF file or hub name, as the embedded engine would load it.

        The weights are read once, for their digest, which is cached on disk. Raises ModelError.
        """
        import torch
        from transformers import GenerationConfig

        kind = getattr(torch, dtype)
        checkpoint = Checkpoint.of(name)
        with ensure_unchanged(checkpoint.folder, checkpoint.files) as identity:
            tokenizer = load_tokenizer(checkpoint)
            model = build_without_weights(checkpoint, kind)
            digest = cached_weights_digest(model, identity, lambda: load_model(checkpoint, kind))
        folder = checkpoint.folder
        if (folder / "generation_config.json").is_file():  # a model need not have one
            model.generation_config = GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
        config = model.config
        spec = kv_spec(config, dtype)
        return cls(
            tokenizer,
            spec,
            replace(
                fingerprint(model, tokenizer, checkpoint.name, codec=codec, weights=digest),
                spec=spec,
            ),
            context_tokens(config),
            sum(weight.numel() for weight in model.parameters()),
            int(config.get_text_config().num_attention_heads),
            frozenset(end_tokens(model, tokenizer)),
        )


def kv_spec(config: Any, dtype: str) -> KVSpec:
    """The shape of the KV of a model with this configuration, in ``dtype``."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return KVSpec(
        text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype,
    )
