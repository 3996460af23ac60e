"""A prompt of three chunks, its stored KV, and the model without the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.testing.blender import (
    CHUNKS,
    PREFIX,
    PROMPT,
    QUESTION,
    SENSITIVITIES,
    STRANGER,
    encoded,
    run,
    variants,
)
from ragcache.testing.blender import MemorySource as Held
from ragcache.types import Tokens

__all__ = [
    "CHUNKS",
    "PREFIX",
    "PROMPT",
    "QUESTION",
    "SENSITIVITIES",
    "STRANGER",
    "Held",
    "encoded",
    "run",
    "variants",
]


def plain(engine: TransformersEngine, tokens: Tokens) -> Tensor:
    """Last logits of the model by itself."""
    with torch.inference_mode():
        logits: Tensor = engine.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.float()
