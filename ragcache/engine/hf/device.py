"""The device and the dtype that a model is computed with."""

from __future__ import annotations

from pathlib import Path

import torch

from ragcache.errors import ConfigError

__all__ = ["published_dtype", "resolve_device", "resolve_dtype"]


def resolve_device(device: str) -> torch.device:
    """The device that a setting names; auto: CUDA if it is available, else the CPU.

    Raises ConfigError for an unknown device, or for CUDA without a GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown: use auto, cpu or cuda") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no GPU: use cpu")
    return resolved


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype that a setting names; auto: bfloat16 on device type "cuda", else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"


def published_dtype(name: str | Path) -> str | None:
    """The dtype in a model's config.json; None without that file, or without a dtype in it.

    Also None for a GGUF file, which is converted to float32.
    """
    from transformers import PretrainedConfig

    if Path(name).is_file():
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(str(name))
    except (OSError, ValueError):
        return None
    parts = (config, config.get("text_config") or {})
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((str(one).removeprefix("torch.") for one in named if one), None)
