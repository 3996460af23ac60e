"""In what a model is computed, and in what its makers have published it."""

from __future__ import annotations

from pathlib import Path


def computed(dtype: str, device: str) -> str:
    """What ``dtype`` auto means on a device ("cpu" or "cuda")."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"


def published(name: str | Path) -> str | None:
    """The dtype that a model's config.json names; None where there is none, or it names none."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(str(name))
    except (OSError, ValueError):
        return None
    parts = (config, config.get("text_config") or {})
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((str(one).removeprefix("torch.") for one in named if one), None)
