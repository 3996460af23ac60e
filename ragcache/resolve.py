"""From a prompt to what is stored of it: keys, hits and misses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ragcache.blend.base import Behind, Blender, Layout, positions
from ragcache.compiled import Compiled
from ragcache.store.base import ChunkStore, Miss, Stored, Variant
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.types import Fingerprint, Prompt


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the store has of one prompt, for one blender."""

    layout: Layout
    keys: tuple[ChunkKey, ...]  # of the chunks, in prompt order
    prefix_key: ChunkKey
    stored: tuple[Stored, ...]  # what is loaded: the prefix first, then chunks in order
    misses: dict[int, Miss]  # chunk number -> why it is not loaded
    served: dict[int, Variant]  # chunk number -> the variant that is loaded

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
    names = tuple(map(digest_tokens, prompt.chunks)) if blender.behind == "variant" else ()
    keys = chunk_keys(prompt, fingerprint, blender.behind, compiled, tenant)
    prefix_key = ChunkKey(fingerprint, prompt.prefix, tenant=tenant)
    prefix: Stored | Miss = Miss("absent")
    found: list[Stored | Miss] = [Miss("absent", f"mode {blender.name} loads nothing")] * len(keys)
    if blender.behind != "nothing":
        prefix = _find(store, prefix_key, unusable) if prompt.prefix else Miss("absent")
    if blender.behind in ("compiled", "context"):
        found = [_find(store, key, unusable) for key in keys]
    served: dict[int, Variant] = {}
    if blender.behind == "context":
        found = _until_first_miss(found, prefix)
    if blender.behind == "variant":
        fits = [_fitting(store, key, blender, names[:i], unusable) for i, key in enumerate(keys)]
        served = {i: fit for i, fit in enumerate(fits) if isinstance(fit, Variant)}
        found = [fit.stored if isinstance(fit, Variant) else fit for fit in fits]
        keys = tuple(
            f.key if isinstance(f, Stored) else k for f, k in zip(found, keys, strict=True)
        )
    loaded = tuple(isinstance(f, Stored) for f in found)
    layout = Layout(
        prompt,
        loaded,
        isinstance(prefix, Stored),
        positions(prompt, blender.placement),
        tuple(served[i].notes if i in served else None for i in range(len(keys))),
        names,
    )
    stored = tuple(f for f in (prefix, *found) if isinstance(f, Stored))
    misses = {i: f for i, f in enumerate(found) if isinstance(f, Miss)}
    return Resolved(layout, keys, prefix_key, stored, misses, served)


def chunk_keys(
    prompt: Prompt, fingerprint: Fingerprint, behind: Behind, compiled: Compiled, tenant: str
) -> tuple[ChunkKey, ...]:
    """Keys of the chunks: compiled one by one, or with all that stands before them here."""
    if behind in ("compiled", "nothing"):
        return tuple(
            ChunkKey(fingerprint, chunk, compiled.behind, compiled.mode, tenant)
            for chunk in prompt.chunks
        )
    keys, before = [], prompt.prefix
    for chunk in prompt.chunks:
        if behind == "variant":
            keys.append(variant_key(fingerprint, chunk, before, tenant))
        else:
            keys.append(ChunkKey(fingerprint, chunk, before, tenant=tenant))
        before += chunk
    return tuple(keys)


def _find(store: ChunkStore, key: ChunkKey, unusable: Collection[bytes]) -> Stored | Miss:
    if key.digest in unusable:
        return Miss("corrupt", "its record failed its check while being read")
    return store.find(key)


def _fitting(
    store: ChunkStore,
    key: ChunkKey,
    blender: Blender,
    before: Sequence[bytes],
    unusable: Collection[bytes],
) -> Variant | Miss:
    """The variant of a chunk that costs least behind ``before``; of equals the one worth most."""
    usable = [v for v in store.variants(key) if v.stored.key.digest not in unusable]
    costs = [(blender.overhead(v.notes, before), v) for v in usable]
    fitting = [(cost, -v.score, n, v) for n, (cost, v) in enumerate(costs) if cost is not None]
    if not fitting:
        fits = f"none of its {len(usable)} variants fits its company" if usable else "no variant"
        exact = store.find(key)  # counts the miss
        assert isinstance(exact, Miss) or exact.key.digest in unusable
        reason = exact.reason if isinstance(exact, Miss) else "corrupt"
        return Miss(reason, f"{fits}: computed, and kept as one")
    best = min(fitting)[-1]
    found = store.find(best.stored.key)
    return found if isinstance(found, Miss) else best


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
