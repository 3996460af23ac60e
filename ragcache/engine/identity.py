"""What is known of a model without running it: where another process does that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ragcache.engine.decode import end_tokens
from ragcache.engine.fingerprint import cached_weights_digest, fingerprint
from ragcache.errors import ModelError
from ragcache.types import Fingerprint, KVSpec


@dataclass(frozen=True, slots=True)
class Identity:
    """A model's names: two processes that find the same can use each other's KV."""

    tokenizer: Any
    spec: KVSpec
    fingerprint: Fingerprint
    context_tokens: int
    parameters: int  # how many weights
    heads: int  # query heads of a layer
    ends: frozenset[int]  # tokens that end an answer

    @classmethod
    def of(cls, name: str, dtype: str, codec: str = "raw") -> Identity:
        """Of a model's folder or hub name, as the embedded engine would load it.

        The weights are read once, for their digest, which is kept for next time where ``name`` is a
        folder. Raises ModelError.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        kind = getattr(torch, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
            config = AutoConfig.from_pretrained(name)
            with torch.device("meta"):
                outline: Any = AutoModelForCausalLM.from_config(config, dtype=kind)

            def load() -> Any:
                return AutoModelForCausalLM.from_pretrained(name, dtype=kind)

            files = list(Path(name).glob("*.safetensors"))
            digest = cached_weights_digest(outline, files, load) if files else ""
            model = outline if digest else load()
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load the model {name!r}: {error}. Name what the servers were started with."
            ) from error
        try:
            outline.generation_config = GenerationConfig.from_pretrained(name)
        except OSError:
            pass  # a model need not have one
        text = config.get_text_config()
        heads, dim = text.num_attention_heads, getattr(text, "head_dim", None)
        spec = KVSpec(
            text.num_hidden_layers,
            getattr(text, "num_key_value_heads", None) or heads,
            dim or text.hidden_size // heads,
            dtype,
        )
        folder = Path(name).name if Path(name).is_dir() else name
        return cls(
            tokenizer,
            spec,
            replace(fingerprint(model, tokenizer, folder, codec=codec, weights=digest), spec=spec),
            int(text.max_position_embeddings),
            sum(weight.numel() for weight in outline.parameters()),
            int(heads),
            frozenset(end_tokens(outline, tokenizer)),
        )
