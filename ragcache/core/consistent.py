"""Compute what is missing for a prompt as it would be stored, before the prompt is prefilled.

With this, an answer does not depend on what is stored: a chunk that is missing, evicted or damaged
is computed alone, in its encoding context and in the precision of the store's codec, and is then
fused like one that was loaded. A prompt with overlapping positions needs this, because its chunks
cannot be computed within the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ragcache.blend.base import Blender
from ragcache.core.precompute import Batch, compute_batch
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.errors import ConfigError
from ragcache.planning.lookup import PromptLookup
from ragcache.store.format.record import as_stored
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV

__all__ = ["check_consistent"]


@dataclass(slots=True)
class MissingEncoder:
    """Computes the missing chunks and texts of one prompt. ``encoded`` has all that it computed."""

    engine: Engine
    encoded: dict[ChunkKey, ChunkKV] = field(default_factory=dict)

    def encode(self, found: PromptLookup, blender: Blender) -> list[tuple[ChunkKey, ChunkKV]]:
        """The KV of all that ``blender`` could load of a prompt and that is not stored, with its
        keys, as a store returns it."""
        new: list[tuple[ChunkKey, ChunkKV]] = []
        if blender.reuses == "nothing":
            return new
        wanted = {found.keys[number] for number in found.misses}
        if blender.by_sensitivity:
            wanted |= {record.key for record in found.unmeasured.values()}
        # Each in a forward of its own: bits must not depend on what else is missing.
        for key in wanted:
            new += [(key, kv) for kv in compute_batch(self.engine, Batch(key.context, (key,)))]
        for key in found.missing_texts.values():
            new += [(key, kv) for kv in self.engine.encode([key.tokens], context=key.context)]
        stored = [(key, as_stored(key, kv)) for key, kv in new]
        self.encoded.update(stored)
        return stored


def check_window(engine: Engine, request: PromptRequest) -> None:
    """Raise ConfigError if a sliding window is shorter than a prompt with overlapping positions:
    the window counts rows, not positions."""
    window, tokens = engine.sliding_window, len(request.prompt)
    if window is not None and tokens > window:
        raise ConfigError(
            f"overlapping positions cannot be used: {engine.name} has layers that see {window} "
            f"tokens, and this prompt has {tokens}. Use positions=consecutive."
        )


def check_consistent(blender: Blender) -> None:
    """Raise ConfigError for a method whose answers depend on earlier prompts."""
    if blender.reuses in ("variant", "in_context"):
        raise ConfigError(
            f"misses=consistent cannot be used with mode {blender.mode}, which reuses KV of "
            "earlier prompts. Use fused or another mode, or misses=exact."
        )
