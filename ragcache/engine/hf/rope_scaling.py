"""What a model's configuration says of its RoPE: whether keys can move, and how far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ragcache.errors import ModelError

#: RoPE whose angles depend on the length of the prompt: stored keys cannot be moved.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def context_tokens(config: Any) -> int:
    """The longest prompt and answer together, in tokens.

    That is ``max_position_embeddings``, or ``factor`` times ``original_max_position_embeddings``
    where YaRN stretches RoPE further than that: its factor is by definition the ratio of the two
    contexts, and configurations are published both with the longer context (gpt-oss) and with the
    shorter one (Qwen). The other kinds do not say from what length on they stretch: Gemma 3 names
    the context with its linear factor in it, and Llama 3.1's factor of 8 makes 131,072 of 8,192.
    Whoever scales RoPE linearly raises ``max_position_embeddings`` as well.
    """
    text = config.get_text_config()
    yarn = [p for p in _per_kind(text) if p.get("rope_type") == "yarn" and p.get("factor")]
    stretched = [int(p["factor"] * p["original_max_position_embeddings"]) for p in yarn]
    return max([int(text.max_position_embeddings), *stretched])


def refuse_length_dependent_rope(config: Any, name: str) -> None:
    """Raise ModelError where cos and sin depend on the length of the prompt."""
    found = {p.get("rope_type") for p in _per_kind(config.get_text_config())} & _LENGTH_DEPENDENT
    if found:
        why = f"its RoPE ({found.pop()}) changes with the prompt's length, so keys cannot move"
        raise ModelError(unfit(name, why))


def unfit(name: str, why: str) -> str:
    """Why a model is refused, and what to use."""
    return (
        f"{name} cannot be used: {why}. ragcache drives decoder-only models with rotary position "
        "embeddings and one KV shape, such as Llama, Qwen, Mistral, Gemma or Phi."
    )


def _per_kind(config: Any) -> list[Mapping[str, Any]]:
    """RoPE's parameters, of every kind of layer where each has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
