"""From a prompt to what is stored of it: keys, hits and misses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ragcache.blend.base import Behind, Blender, Layout, positions
from ragcache.compiled import Compiled
from ragcache.store.base import ChunkStore, Miss, Stored
from ragcache.store.key import ChunkKey
from ragcache.types import Fingerprint, Prompt


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the store has of one prompt, for one blender."""

    layout: Layout
    keys: tuple[ChunkKey, ...]  # of the chunks, in prompt order
    prefix_key: ChunkKey
    stored: tuple[Stored, ...]  # what is loaded: the prefix first, then chunks in order
    misses: dict[int, Miss]  # chunk number -> why it is not loaded

    def number_of(self, key: bytes) -> int | None:
        """Number of the first loaded chunk under a key digest; None for the prefix."""
        return next((i for i, k in enumerate(self.keys) if k.digest == key), None)


def resolve(
    prompt: Prompt,
    blender: Blender,
    store: ChunkStore,
    fingerprint: Fingerprint,
    *,
    compiled: Compiled,
    tenant: str = "",
    unusable: Collection[bytes] = (),
) -> Resolved:
    """Look every part of ``prompt`` up. ``unusable`` are digests that failed while being read."""
    keys = chunk_keys(prompt, fingerprint, blender.behind, compiled, tenant)
    prefix_key = ChunkKey(fingerprint, prompt.prefix, tenant=tenant)
    prefix: Stored | Miss = Miss("absent")
    found: list[Stored | Miss] = [Miss("absent", f"mode {blender.name} loads nothing")] * len(keys)
    if blender.behind != "nothing":
        prefix = _find(store, prefix_key, unusable) if prompt.prefix else Miss("absent")
        found = [_find(store, key, unusable) for key in keys]
    if blender.behind == "context":
        found = _until_first_miss(found, prefix)
    loaded = tuple(isinstance(f, Stored) for f in found)
    layout = Layout(
        prompt, loaded, isinstance(prefix, Stored), positions(prompt, blender.placement)
    )
    stored = tuple(f for f in (prefix, *found) if isinstance(f, Stored))
    misses = {i: f for i, f in enumerate(found) if isinstance(f, Miss)}
    return Resolved(layout, keys, prefix_key, stored, misses)


def chunk_keys(
    prompt: Prompt, fingerprint: Fingerprint, behind: Behind, compiled: Compiled, tenant: str
) -> tuple[ChunkKey, ...]:
    """Keys of the chunks: compiled one by one, or behind all that stands before them."""
    if behind != "context":
        return tuple(
            ChunkKey(fingerprint, chunk, compiled.behind, compiled.mode, tenant)
            for chunk in prompt.chunks
        )
    keys, before = [], prompt.prefix
    for chunk in prompt.chunks:
        keys.append(ChunkKey(fingerprint, chunk, before, tenant=tenant))
        before += chunk
    return tuple(keys)


def _find(store: ChunkStore, key: ChunkKey, unusable: Collection[bytes]) -> Stored | Miss:
    if key.digest in unusable:
        return Miss("corrupt", "its record failed its check while being read")
    return store.find(key)


def _until_first_miss(found: list[Stored | Miss], prefix: Stored | Miss) -> list[Stored | Miss]:
    """Prefix caching ends at the first part that is not at hand."""
    hits = (
        0
        if isinstance(prefix, Miss)
        else next((i for i, f in enumerate(found) if isinstance(f, Miss)), len(found))
    )
    rest = [
        f if isinstance(f, Miss) else Miss("absent", "a part before it is not at hand")
        for f in found[hits:]
    ]
    return found[:hits] + rest
