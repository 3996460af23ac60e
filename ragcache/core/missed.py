"""Chunks that an answer needed and that were not stored: computed and stored for next time."""

from __future__ import annotations

from ragcache.core.precompute import keep, precompute
from ragcache.core.prefill import FusedPrefill, PrefillContext
from ragcache.core.request import PromptRequest
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.base import Engine
from ragcache.errors import ConfigError
from ragcache.planning.lookup import chunk_keys
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV


class MissedChunks:
    """What one answer leaves to be stored. It holds copies of KV, none of the prompt's own."""

    def __init__(self, engine: Engine, context: PrefillContext, done: FusedPrefill) -> None:
        self._engine, self._store, self._encoding = engine, context.store, context.encoding
        self._found, self._blender, self._unreadable = done.found, done.blender, done.unreadable
        self._captured, self._notes = done.fused.captured, done.fused.notes

    def __bool__(self) -> bool:
        """Whether there is anything to store, or a variant's use to be noted."""
        found = self._found
        missing = found.misses or not found.layout.prefix_loaded or found.served
        changes = missing or self._unreadable or self._unmeasured
        return self._blender.behind != "nothing" and bool(changes)

    def store(self) -> None:
        """Store the KV of the chunks, and of the prefix, that were not stored."""
        engine, store, found = self._engine, self._store, self._found
        if self._blender.behind == "nothing":
            return
        for key in self._unreadable:
            store.delete(key)
        if self._captured:
            missed = [found.keys[i] for i in sorted(found.misses)]
            notes = self._notes or [None] * len(missed)
            lacking = set(store.missing(missed))  # another answer may have stored the others
            for key, kv, seen in zip(missed, self._captured, notes, strict=True):
                if seen is not None:
                    keep(store, key, kv, seen)
                elif key in lacking:
                    keep(store, key, self._measured(key, kv), None)
        elif found.misses and not self._encoding.similar:
            precompute(engine, store, [found.keys[i] for i in found.misses])
        if not found.layout.prefix_loaded and found.prefix_key.tokens:
            precompute(engine, store, [found.prefix_key])
        if self._unmeasured:
            precompute(engine, store, self._unmeasured)
        if found.served:
            store.credit(self._worth())

    @property
    def _unmeasured(self) -> list[ChunkKey]:
        """Keys of chunks that are stored as they are encoded, but without their sensitivity."""
        if self._blender.behind != "compiled" or self._encoding.similar:
            return []
        every = self._found.unmeasured.values()
        return [one.key for one in every if one.codec == self._found.prefix_key.codec]

    def _measured(self, key: ChunkKey, kv: ChunkKV) -> ChunkKV:
        """With its sensitivity where this is KV that is encoded after the prefix: it is found
        under the same key by methods that ask for it."""
        if key.behind != self._found.prefix_key.tokens:
            return kv
        [kv] = measure_sensitivity(self._engine, [kv], key.behind)
        return kv

    def _worth(self) -> dict[ChunkKey, float]:
        """What each variant's use was worth: 1 / CFO, at least 1 and at most 100."""
        names, worth = self._found.layout.names, {}
        for number, variant in self._found.served.items():
            cost = self._blender.overhead(variant.notes, names[:number])
            worth[variant.stored.key] = 1 / max(0.01, cost or 0.0)
        return worth


def encode_missing(engine: Engine, context: PrefillContext, request: PromptRequest) -> list[str]:
    """Encode and store the missing chunks of a prompt whose chunks share positions: those cannot be
    computed in place. What there is to say of it, as fallbacks."""
    prompt, blender = request.prompt, request.blender
    _check_window(engine, request)
    keys = chunk_keys(prompt, engine.fingerprint, blender.behind, context.encoding, context.tenant)
    if context.encoding.similar and context.store.missing(keys):
        raise ConfigError(
            f"mode {blender.mode} needs the KV of all chunks, and some are not stored: "
            f"they are {context.encoding.mode}, which only `ragcache index` can do. Run it."
        )
    done = precompute(engine, context.store, keys)
    return [f"{done.encoded} chunks were not stored: encoded first"] if done.encoded else []


def _check_window(engine: Engine, request: PromptRequest) -> None:
    """Raise ConfigError where overlapping positions would fool a sliding window."""
    window, tokens = engine.sliding_window, len(request.prompt)
    if window is not None and tokens > window:
        raise ConfigError(
            f"overlapping positions cannot be used: {engine.name} has layers that see {window} "
            f"tokens, and this prompt has {tokens}. Use positions=consecutive."
        )
