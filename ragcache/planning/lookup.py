"""Look up a prompt's parts in a store: their keys, hits and misses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ragcache.blend.base import Blender, Layout, ReusedKV, positions
from ragcache.planning.context import EncodingContext
from ragcache.store.base import ChunkStore, Miss, StoredChunk, Variant
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.types import Fingerprint, Prompt

__all__ = ["PromptLookup", "chunk_keys", "look_up"]

_AFTER_A_MISS = Miss("absent", "a part before it is not stored")


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """The stored KV of one prompt that one blender can use."""

    layout: Layout
    keys: tuple[ChunkKey, ...]  # of the chunks, in prompt order; for loaded ones, of their records
    prefix_key: ChunkKey
    stored: tuple[StoredChunk, ...]  # to be loaded: the prefix first, then chunks in order
    misses: dict[int, Miss]  # chunk number -> why it is not loaded
    served: dict[int, Variant]  # chunk number -> the variant that is loaded
    cheaper: frozenset[int] = frozenset()  # stored chunks that are cheaper to compute than to load

    @property
    def prefix(self) -> StoredChunk | None:
        """The prefix, if it is loaded."""
        return self.stored[0] if self.layout.prefix_loaded else None

    @property
    def chunks(self) -> dict[int, StoredChunk]:
        """The chunks that are loaded, by number."""
        numbers = (i for i, loaded in enumerate(self.layout.loaded) if loaded)
        return dict(zip(numbers, self.stored[self.layout.prefix_loaded :], strict=True))

    @property
    def unmeasured(self) -> dict[int, StoredChunk]:
        """The loaded chunks that are stored without their sensitivity, by number."""
        return {number: record for number, record in self.chunks.items() if not record.sensitivity}

    def without(self, numbers: Collection[int]) -> PromptLookup:
        """The same lookup, but these chunks are computed; they do not count as misses."""
        kept = {i: record for i, record in self.chunks.items() if i not in numbers}
        return replace(
            self,
            layout=replace(
                self.layout, loaded=tuple(i in kept for i in range(len(self.layout.loaded)))
            ),
            stored=(*self.stored[: self.layout.prefix_loaded], *kept.values()),
            cheaper=self.cheaper | frozenset(numbers),
        )

    def with_records(self, records: Mapping[int, StoredChunk]) -> PromptLookup:
        """The same lookup, with other records of loaded chunks, by chunk number."""
        chunks = {**self.chunks, **records}
        return replace(
            self,
            keys=tuple(records[i].key if i in records else k for i, k in enumerate(self.keys)),
            stored=(*self.stored[: self.layout.prefix_loaded], *chunks.values()),
        )

    def number_of(self, key: bytes) -> int | None:
        """Number of the first chunk with this key digest; None if it is not a chunk's."""
        return next((i for i, k in enumerate(self.keys) if k.digest == key), None)


def look_up(
    prompt: Prompt,
    blender: Blender,
    store: ChunkStore,
    fingerprint: Fingerprint,
    *,
    encoding: EncodingContext,
    tenant: str = "",
    unusable: Collection[bytes] = (),
) -> PromptLookup:
    """Look up every part of ``prompt``. ``unusable``: key digests of records that could not be
    read; they count as damaged. Raises StoreError if the store fails."""
    reuses = blender.reuses
    keys = chunk_keys(prompt, fingerprint, reuses, encoding, tenant)
    names = tuple(map(digest_tokens, prompt.chunks)) if reuses == "variant" else ()
    prefix_key = ChunkKey(fingerprint, prompt.prefix, tenant=tenant)
    prefix: StoredChunk | Miss = Miss("absent")
    if reuses != "nothing" and prompt.prefix:
        (prefix,) = _find(store, [prefix_key], unusable)
    found: list[StoredChunk | Variant | Miss]
    if reuses == "nothing":
        found = [Miss("absent", f"mode {blender.name} loads nothing")] * len(keys)
    elif reuses == "variant":
        found = [_fitting(store, key, blender, names[:i], unusable) for i, key in enumerate(keys)]
    else:
        found = list(_find(store, keys, unusable))
    if reuses == "in_context":
        found = _until_first_miss(found, prefix)
    records = [f.stored if isinstance(f, Variant) else f for f in found]
    layout = Layout(
        prompt,
        tuple(isinstance(record, StoredChunk) for record in records),
        isinstance(prefix, StoredChunk),
        positions(prompt, blender.placement),
        tuple(f.notes if isinstance(f, Variant) else None for f in found),
        names,
        _sensitivities(prompt, records, encoding.exact(prompt.prefix)),
    )
    return PromptLookup(
        layout,
        tuple(
            r.key if isinstance(r, StoredChunk) else k for r, k in zip(records, keys, strict=True)
        ),
        prefix_key,
        tuple(record for record in (prefix, *records) if isinstance(record, StoredChunk)),
        {i: f for i, f in enumerate(found) if isinstance(f, Miss)},
        {i: f for i, f in enumerate(found) if isinstance(f, Variant)},
    )


def chunk_keys(
    prompt: Prompt,
    fingerprint: Fingerprint,
    reuses: ReusedKV,
    encoding: EncodingContext,
    tenant: str,
) -> tuple[ChunkKey, ...]:
    """Keys of the chunks: as precomputed under ``encoding``, or in the context of this prompt."""
    if reuses in ("encoded", "nothing"):
        return tuple(encoding.key(fingerprint, chunk, tenant) for chunk in prompt.chunks)
    keys, before = [], prompt.prefix
    for chunk in prompt.chunks:
        if reuses == "variant":
            keys.append(variant_key(fingerprint, chunk, before, tenant))
        else:
            keys.append(ChunkKey(fingerprint, chunk, before, tenant=tenant))
        before += chunk
    return tuple(keys)


def _find(
    store: ChunkStore, keys: Sequence[ChunkKey], unusable: Collection[bytes]
) -> list[StoredChunk | Miss]:
    usable = [key for key in keys if key.digest not in unusable]
    found = dict(zip(usable, store.get_headers(usable), strict=True))
    failed = Miss("corrupt", "its record failed its check while being read")
    return [found.get(key, failed) for key in keys]


def _fitting(
    store: ChunkStore,
    key: ChunkKey,
    blender: Blender,
    before: Sequence[bytes],
    unusable: Collection[bytes],
) -> Variant | Miss:
    """The variant of a chunk with the lowest overhead after the chunks ``before``; of several such,
    the one with the highest score."""
    usable = [v for v in store.variants.find(key) if v.stored.key.digest not in unusable]
    costs = [(blender.overhead(v.notes, before), v) for v in usable]
    fitting = [(cost, -v.score, n, v) for n, (cost, v) in enumerate(costs) if cost is not None]
    if not fitting:
        fits = f"none of its {len(usable)} variants fits this context" if usable else "no variant"
        exact = store.get_header(key)  # counts the miss; if it is found, its notes are damaged
        reason = exact.reason if isinstance(exact, Miss) else "corrupt"
        return Miss(reason, f"{fits}: computed, and kept as one")
    best = min(fitting)[-1]
    found = store.get_header(best.stored.key)
    return found if isinstance(found, Miss) else best


def _sensitivities(
    prompt: Prompt, records: Sequence[StoredChunk | Miss], first_exact: bool
) -> tuple[tuple[float, ...], ...]:
    """The sensitivities of every chunk's tokens, () where unknown. ``first_exact``: the first chunk
    directly follows the context that it was computed in, so its sensitivities are 0."""
    found = [record.sensitivity if isinstance(record, StoredChunk) else () for record in records]
    if found and first_exact:
        found[0] = (0.0,) * len(prompt.chunks[0])
    return tuple(found)


def _until_first_miss(
    found: Sequence[StoredChunk | Variant | Miss], prefix: StoredChunk | Miss
) -> list[StoredChunk | Variant | Miss]:
    """``found`` with everything after the first miss turned into misses, as in prefix caching."""
    kept: list[StoredChunk | Variant | Miss] = []
    whole = isinstance(prefix, StoredChunk)
    for part in found:
        if isinstance(part, Miss):
            whole = False
        kept.append(part if whole or isinstance(part, Miss) else _AFTER_A_MISS)
    return kept
