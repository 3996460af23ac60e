"""A small engine, a prompt of three chunks, and what is stored of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, positions
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.engine.transformers import TransformersEngine
from ragcache.types import ChunkKV, Prompt, Tokens

PREFIX: Tokens = (1, 5, 9)
CHUNKS: tuple[Tokens, ...] = (tuple(range(10, 22)), tuple(range(30, 47)), tuple(range(60, 69)))
QUESTION: Tokens = (100, 101, 102, 103)
PROMPT = Prompt(PREFIX, CHUNKS, QUESTION)


class Held:
    """A KVSource over KV in memory."""

    def __init__(self, parts: Sequence[ChunkKV]) -> None:
        self.parts = parts
        self.bytes_loaded = 0

    def layer(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        self.bytes_loaded += sum(p.keys[layer].nbytes + p.values[layer].nbytes for p in self.parts)
        return [(p.keys[layer], p.values[layer]) for p in self.parts]


def encoded(engine: TransformersEngine, prompt: Prompt, blender: Blender) -> list[ChunkKV]:
    """The prefix and every chunk as the blender wants them stored."""
    parts, behind = engine.encode([prompt.prefix]), prompt.prefix
    for chunk in prompt.chunks:
        parts += engine.encode([chunk], behind=behind)
        if blender.behind == "context":
            behind += chunk
    return parts


def run(
    engine: TransformersEngine,
    blender: Blender,
    prompt: Prompt = PROMPT,
    *,
    missing: Sequence[int] = (),
    room: int = 1,
) -> FusedPrompt:
    """Fuse with everything stored but the chunks in ``missing``."""
    prefix, *chunks = encoded(engine, prompt, blender)
    stored = blender.behind != "nothing"
    loaded = tuple(stored and i not in missing for i in range(len(chunks)))
    parts = [prefix] * stored + [c for c, here in zip(chunks, loaded, strict=True) if here]
    layout = Layout(prompt, loaded, stored, positions(prompt, blender.placement))
    return fuse(engine, blender, layout, Held(parts), room=room)


def plain(engine: TransformersEngine, tokens: Tokens) -> Tensor:
    """Last logits of the model by itself."""
    with torch.inference_mode():
        logits: Tensor = engine.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.float()
