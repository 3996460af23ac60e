"""Look up a prompt's parts in a store: their keys, hits and misses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from ragcache.blend.base import Blender, Layout, ReusedKV, positions
from ragcache.planning.context import EncodingContext
from ragcache.store.base import ChunkStore, Miss, StoredChunk, Variant
from ragcache.store.key import ChunkKey, digest_tokens, variant_key
from ragcache.types import Fingerprint, Prompt

__all__ = ["PromptLookup", "look_up"]

_KEPT = Miss("absent", "its KV is that of an earlier prompt")
_AFTER_A_MISS = Miss("absent", "a part before it is not stored")


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """The stored KV of one prompt that one blender can use."""

    layout: Layout
    keys: tuple[ChunkKey, ...]  # of the chunks, in prompt order; for loaded ones, of their records
    text_keys: tuple[ChunkKey, ...]  # of the first texts, those that the method can load
    texts: tuple[StoredChunk, ...]  # records of the texts that are loaded: the first ones
    chunks: dict[int, StoredChunk]  # records of the chunks that are loaded, by number, ascending
    misses: dict[int, Miss]  # chunk number -> why it is not loaded
    served: dict[int, Variant]  # chunk number -> the variant that is loaded
    cheaper: frozenset[int] = frozenset()  # stored chunks that are cheaper to compute than to load

    @property
    def stored(self) -> tuple[StoredChunk, ...]:
        """The records to load, in prompt order."""
        prompt = self.layout.prompt
        placed = [
            *zip(prompt.text_spans, self.texts, strict=False),
            *((prompt.spans[number], record) for number, record in self.chunks.items()),
        ]
        return tuple(record for _, record in sorted(placed, key=lambda each: each[0]))

    @property
    def missing_texts(self) -> dict[int, ChunkKey]:
        """The keys of the texts that the method can load and that are not stored, by number."""
        loaded = len(self.texts)
        return dict(enumerate(self.text_keys[loaded:], loaded))

    @property
    def unmeasured(self) -> dict[int, StoredChunk]:
        """The loaded chunks that are stored without their sensitivity, by number."""
        return {number: record for number, record in self.chunks.items() if not record.sensitivity}

    def without(self, numbers: Collection[int]) -> PromptLookup:
        """The same lookup, but these chunks are computed; they do not count as misses."""
        kept = {i: record for i, record in self.chunks.items() if i not in numbers}
        loaded = tuple(i in kept for i in range(len(self.layout.loaded)))
        return replace(
            self,
            layout=replace(self.layout, loaded=loaded),
            chunks=kept,
            cheaper=self.cheaper | frozenset(numbers),
        )

    def with_records(self, records: Mapping[int, StoredChunk]) -> PromptLookup:
        """The same lookup, with other records of loaded chunks, by chunk number."""
        return replace(
            self,
            keys=tuple(records[i].key if i in records else k for i, k in enumerate(self.keys)),
            chunks={**self.chunks, **records},
        )

    def name_of(self, key: bytes) -> tuple[str, ChunkKey]:
        """What to call the first part with this key digest in a message, and its key."""
        for number, each in enumerate(self.keys, 1):
            if each.digest == key:
                return f"chunk {number}", each
        number, each = next((n, k) for n, k in enumerate(self.text_keys, 1) if k.digest == key)
        return f"text {number}" if len(self.text_keys) > 1 else "the prefix", each


def look_up(
    prompt: Prompt,
    blender: Blender,
    store: ChunkStore,
    fingerprint: Fingerprint,
    *,
    encoding: EncodingContext,
    tenant: str = "",
    unusable: Collection[bytes] = (),
    kept: int = 0,
    count: bool = True,
) -> PromptLookup:
    """Look up every part of ``prompt``. ``unusable``: key digests of records that could not be
    read; they count as damaged. ``kept``: first rows whose KV is that of an earlier prompt; nothing
    is looked up for the chunks among them, nor for texts. ``count``: as for
    :meth:`ChunkStore.get_header`. Raises StoreError if the store fails."""
    reuses = blender.reuses
    keys = chunk_keys(prompt, fingerprint, reuses, encoding, tenant)
    first = sum(1 for start, _ in prompt.spans if start < kept)  # the first chunk to look up
    of_texts = () if kept else text_keys(prompt, fingerprint, reuses, tenant)
    names = tuple(map(digest_tokens, prompt.chunks)) if reuses == "variant" else ()
    texts = _until_first_miss(_find(store, of_texts, unusable, count))
    found: list[StoredChunk | Variant | Miss]
    if reuses == "nothing":
        found = [Miss("absent", f"mode {blender.name} loads nothing")] * len(keys)
    elif reuses == "variant":
        found = [
            _fitting(store, key, blender, names[:i], unusable, count) for i, key in enumerate(keys)
        ]
    else:
        found = [*[_KEPT] * first, *_find(store, keys[first:], unusable, count)]
    if reuses == "in_context":
        texts, found = _until_first_gap(prompt, texts, found)
    records = [f.stored if isinstance(f, Variant) else f for f in found]
    exact = _exact(prompt, reuses, keys, records)
    layout = Layout(
        prompt,
        tuple(isinstance(record, StoredChunk) for record in records),
        len(texts),
        positions(prompt, blender.placement),
        tuple(f.notes if isinstance(f, Variant) else None for f in found),
        names,
        _sensitivities(prompt, records, exact),
        kept,
        exact,
    )
    return PromptLookup(
        layout,
        tuple(
            r.key if isinstance(r, StoredChunk) else k for r, k in zip(records, keys, strict=True)
        ),
        of_texts,
        tuple(texts),
        {i: record for i, record in enumerate(records) if isinstance(record, StoredChunk)},
        {i: f for i, f in enumerate(found) if isinstance(f, Miss) and f is not _KEPT},
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
        stored = (part.stored or part.tokens for part in prompt.parts if part.is_chunk)
        return tuple(encoding.key(fingerprint, chunk, tenant) for chunk in stored)
    keys = []
    for chunk, (start, _) in zip(prompt.chunks, prompt.spans, strict=True):
        before = prompt.tokens[:start]
        if reuses == "variant":
            keys.append(variant_key(fingerprint, chunk, before, tenant))
        else:
            keys.append(ChunkKey(fingerprint, chunk, before, tenant=tenant))
    return tuple(keys)


def text_keys(
    prompt: Prompt, fingerprint: Fingerprint, reuses: ReusedKV, tenant: str = ""
) -> tuple[ChunkKey, ...]:
    """Keys of the texts whose KV can be loaded: those before the first chunk, and with
    ``in_context`` all. The prompt's last part is always computed. Their KV depends on everything
    before them, so that is their context."""
    if reuses == "nothing":
        return ()
    spans = prompt.text_spans if reuses == "in_context" else prompt.text_spans[: len(prompt.lead)]
    tokens = prompt.tokens
    return tuple(
        ChunkKey(fingerprint, tokens[start:stop], tokens[:start], tenant=tenant)
        for start, stop in spans
        if stop < len(prompt)
    )


def _find(
    store: ChunkStore, keys: Sequence[ChunkKey], unusable: Collection[bytes], count: bool
) -> list[StoredChunk | Miss]:
    usable = [key for key in keys if key.digest not in unusable]
    found = dict(zip(usable, store.get_headers(usable, count=count), strict=True))
    failed = Miss("corrupt", "its record failed its check while being read")
    return [found.get(key, failed) for key in keys]


def _fitting(
    store: ChunkStore,
    key: ChunkKey,
    blender: Blender,
    before: Sequence[bytes],
    unusable: Collection[bytes],
    count: bool,
) -> Variant | Miss:
    """The variant of a chunk with the lowest overhead after the chunks ``before``; of several such,
    the one with the highest score."""
    usable = [v for v in store.variants.find(key) if v.stored.key.digest not in unusable]
    costs = [(blender.overhead(v.notes, before, _in_context(v.stored, key)), v) for v in usable]
    fitting = [(cost, -v.score, n, v) for n, (cost, v) in enumerate(costs) if cost is not None]
    if not fitting:
        fits = f"none of its {len(usable)} variants fits this context" if usable else "no variant"
        exact = store.get_header(
            key, count=count
        )  # counts the miss; if it is found, its notes are damaged
        reason = exact.reason if isinstance(exact, Miss) else "corrupt"
        return Miss(reason, f"{fits}: computed, and kept as one")
    best = min(fitting)[-1]
    found = store.get_header(best.stored.key, count=count)
    return found if isinstance(found, Miss) else best


def _exact(
    prompt: Prompt,
    reuses: ReusedKV,
    keys: Sequence[ChunkKey],
    records: Sequence[StoredChunk | Miss],
) -> tuple[bool, ...]:
    """Whether the KV of each chunk was computed after exactly the tokens before it."""
    if reuses == "encoded":
        starts = (start for start, _ in prompt.spans)
        return tuple(
            start == len(key.context) and prompt.tokens[:start] == key.context
            for start, key in zip(starts, keys, strict=True)
        )
    return tuple(
        isinstance(record, StoredChunk) and _in_context(record, key)
        for record, key in zip(records, keys, strict=True)
    )


def _in_context(record: StoredChunk, key: ChunkKey) -> bool:
    """Whether ``record`` was computed in the context of ``key``, the chunk's in this prompt: the
    mode of a variant's key has a digest of it."""
    return record.key.mode == key.mode


def _sensitivities(
    prompt: Prompt, records: Sequence[StoredChunk | Miss], exact: Sequence[bool]
) -> tuple[tuple[float, ...], ...]:
    """The sensitivities of every chunk's tokens, () where unknown; 0 where its KV is exact."""
    return tuple(
        (0.0,) * len(chunk)
        if here
        else record.sensitivity[: len(chunk)]
        if isinstance(record, StoredChunk)
        else ()
        for record, chunk, here in zip(records, prompt.chunks, exact, strict=True)
    )


def _until_first_miss(found: Sequence[StoredChunk | Miss]) -> list[StoredChunk]:
    """The records before the first miss, as in prefix caching."""
    return list(takewhile(lambda record: isinstance(record, StoredChunk), found))  # type: ignore[arg-type]


def _until_first_gap(
    prompt: Prompt, texts: Sequence[StoredChunk], found: Sequence[StoredChunk | Variant | Miss]
) -> tuple[list[StoredChunk], list[StoredChunk | Variant | Miss]]:
    """The texts and chunks before the first part of the prompt that is not stored. The chunks after
    it are misses."""
    loaded = iter(texts)
    kept: list[StoredChunk | Variant | Miss] = []
    first: list[StoredChunk] = []
    whole = True
    for part in prompt.parts:
        if part.is_chunk:
            here = found[len(kept)]
            whole = whole and not isinstance(here, Miss)
            kept.append(here if whole or isinstance(here, Miss) else _AFTER_A_MISS)
        elif whole and (text := next(loaded, None)) is not None:
            first.append(text)
        else:
            whole = False
    return first, kept
