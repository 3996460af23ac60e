"""A small engine, a prompt of three chunks, and what is stored of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, positions
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.store.key import digest_tokens
from ragcache.types import ChunkKV, ChunkNotes, LayerLoad, Prompt, Tokens

PREFIX: Tokens = (1, 5, 9)
CHUNKS: tuple[Tokens, ...] = (tuple(range(10, 22)), tuple(range(30, 47)), tuple(range(60, 69)))
QUESTION: Tokens = (100, 101, 102, 103)
STRANGER: Tokens = tuple(range(200, 214))
PROMPT = Prompt(PREFIX, CHUNKS, QUESTION)
SENSITIVITIES = tuple(tuple(token * 37 % 101 / 8 for token in chunk) for chunk in CHUNKS)


class Held:
    """A KVSource over KV in memory."""

    def __init__(self, parts: Sequence[ChunkKV]) -> None:
        self.parts = parts
        self.asked: list[int] = []

    def start(self, layers: Sequence[int]) -> None:
        self.to_come = list(layers)

    def layer(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        assert layer == self.to_come.pop(0)
        self.asked.append(layer)
        return [(p.keys[layer], p.values[layer]) for p in self.parts]

    def load(self, layer: int) -> LayerLoad:
        return LayerLoad(sum(p.keys[layer].nbytes + p.values[layer].nbytes for p in self.parts))


def encoded(engine: TransformersEngine, prompt: Prompt, blender: Blender) -> list[ChunkKV]:
    """The prefix and every chunk as the blender wants them stored."""
    parts, behind = engine.encode([prompt.prefix]), prompt.prefix
    for chunk in prompt.chunks:
        parts += engine.encode([chunk], behind=behind)
        if blender.behind == "context":
            behind += chunk
    return parts


def variants(engine: TransformersEngine, prompt: Prompt) -> tuple[list[ChunkKV], list[ChunkNotes]]:
    """Every chunk cut from a prompt in which it stood behind one that is not in ``prompt``."""
    cut: list[ChunkKV] = []
    seen: list[ChunkNotes] = []
    for chunk in prompt.chunks:
        met = Prompt(prompt.prefix, (STRANGER, chunk), QUESTION)
        names = tuple(map(digest_tokens, met.chunks))
        layout = Layout(met, (False, False), False, tuple(range(len(met))), (), names)
        fused = fuse(engine, CacheCraft(), layout, Held([]), capture=[1])
        cut += fused.captured
        seen += fused.notes
    return cut, seen


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
    notes: list[ChunkNotes] = []
    if blender.behind == "variant":
        chunks, notes = variants(engine, prompt)
    stored = blender.behind != "nothing"
    loaded = tuple(stored and i not in missing for i in range(len(chunks)))
    parts = [prefix] * stored + [c for c, here in zip(chunks, loaded, strict=True) if here]
    place = positions(prompt, blender.placement)
    names = tuple(map(digest_tokens, prompt.chunks))
    sensitive = SENSITIVITIES if prompt == PROMPT else ()
    layout = Layout(prompt, loaded, stored, place, tuple(notes), names, sensitive)
    return fuse(engine, blender, layout, Held(parts), room=room)


def plain(engine: TransformersEngine, tokens: Tokens) -> Tensor:
    """Last logits of the model by itself."""
    with torch.inference_mode():
        logits: Tensor = engine.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.float()
