"""Read RoPE scaling from a configuration: whether keys can be moved, and the longest context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ragcache.errors import ModelError

__all__ = ["refuse_length_dependent_rope"]

#: Kinds of RoPE whose angles depend on the length of the prompt, so that keys cannot be moved.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def context_tokens(config: Any) -> int:
    """Maximum length of prompt and answer together, in tokens.

    This is ``max_position_embeddings``, or, with YaRN, ``factor`` times
    ``original_max_position_embeddings`` if that is more. YaRN's factor is by definition the ratio
    of the two contexts, and configurations are published with the longer context (gpt-oss) or with
    the shorter one (Qwen). Other kinds of scaling have no such rule: in Gemma 3,
    ``max_position_embeddings`` includes the linear factor, and Llama 3.1's factor of 8 does not
    relate its contexts of 8,192 and 131,072. Their ``max_position_embeddings`` is used as it is.
    """
    text = config.get_text_config()
    yarn = [p for p in _per_kind(text) if p.get("rope_type") == "yarn" and p.get("factor")]
    stretched = [int(p["factor"] * p["original_max_position_embeddings"]) for p in yarn]
    return max([int(text.max_position_embeddings), *stretched])


def refuse_length_dependent_rope(config: Any, name: str) -> None:
    """Raise ModelError if cos and sin depend on the length of the prompt."""
    found = {p.get("rope_type") for p in _per_kind(config.get_text_config())} & _LENGTH_DEPENDENT
    if found:
        why = f"its RoPE ({found.pop()}) changes with the prompt's length, so keys cannot move"
        raise ModelError(unsupported_model(name, why))


def unsupported_model(name: str, why: str) -> str:
    """The message of a ModelError: why a model cannot be used, and which can."""
    return (
        f"{name} cannot be used: {why}. ragcache drives decoder-only models with rotary position "
        "embeddings and one KV shape, such as Llama, Qwen, Mistral, Gemma or Phi."
    )


def _per_kind(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters; one item for each kind of layer that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
