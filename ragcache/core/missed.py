"""Store the KV of chunks that a request needed and that were not in the store."""

from __future__ import annotations

from collections.abc import Mapping

from ragcache.core.precompute import precompute, store_captured
from ragcache.core.prefill import FusedPrefill, PrefillContext
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.base import Engine
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV


class MissedChunks:
    """What is to be stored after one answer. KV is copied, so the prompt's own KV can be freed."""

    def __init__(
        self,
        engine: Engine,
        context: PrefillContext,
        done: FusedPrefill,
        encoded: Mapping[ChunkKey, ChunkKV],
    ) -> None:
        """``encoded``: KV that was computed before the prompt, see
        :mod:`ragcache.core.consistent`."""
        self._engine, self._store, self._encoding = engine, context.store, context.encoding
        self._found, self._blender, self._unreadable = done.found, done.blender, done.unreadable
        self._captured, self._notes = done.fused.captured, done.fused.notes
        self._texts = done.fused.captured_texts
        self._encoded = dict(encoded)

    def __bool__(self) -> bool:
        """Whether anything is to be stored, deleted or scored."""
        found = self._found
        missing = found.misses or found.missing_texts or found.served or self._encoded
        changes = missing or self._unreadable or self._unmeasured
        return self._blender.reuses != "nothing" and bool(changes)

    def store(self) -> None:
        """Store the missing KV of chunks and texts, delete unreadable records, and update the
        scores of the variants that were used. Raises StoreError."""
        engine, store, found = self._engine, self._store, self._found
        if self._blender.reuses == "nothing":
            return
        for key in self._unreadable:
            store.delete(key)
        if self._encoded:
            store.put_all(self._encoded.items())
        if self._captured:
            missed = [found.keys[i] for i in sorted(found.misses)]
            notes = self._notes or [None] * len(missed)
            lacking = set(store.missing(missed))  # another request may have stored some
            for key, kv, seen in zip(missed, self._captured, notes, strict=True):
                if seen is not None:
                    store_captured(store, key, kv, seen)
                elif key in lacking:
                    store_captured(store, key, self._measured(key, kv), None)
        elif found.misses:
            precompute(engine, store, [found.keys[i] for i in found.misses])
        if self._texts:
            store.put_all(zip(found.missing_texts.values(), self._texts, strict=True))
        if self._unmeasured:
            precompute(engine, store, self._unmeasured)
        if found.served:
            store.variants.add_score(self._worth())

    @property
    def _unmeasured(self) -> list[ChunkKey]:
        """Keys of stored chunks that have no sensitivity yet, in the store's own codec."""
        if self._blender.reuses != "encoded":
            return []
        every = self._found.unmeasured.values()
        own = self._engine.fingerprint.codec
        return [one.key for one in every if one.codec == own]

    def _measured(self, key: ChunkKey, kv: ChunkKV) -> ChunkKV:
        """``kv`` with its sensitivity if it was computed in the encoding context: other methods,
        which need the sensitivity, find it under the same key."""
        if key != self._encoding.key(key.fingerprint, key.tokens, key.tenant):
            return kv
        [kv] = measure_sensitivity(self._engine, [kv], key.context)
        return kv

    def _worth(self) -> dict[ChunkKey, float]:
        """The score of each variant that was used: 1 / CFO (Cache-Craft), at most 100."""
        layout, worth = self._found.layout, {}
        for number, variant in self._found.served.items():
            before, exact = layout.names[:number], layout.exact[number]
            cost = self._blender.overhead(variant.notes, before, exact)
            worth[variant.stored.key] = 1 / max(0.01, cost or 0.0)
        return worth
