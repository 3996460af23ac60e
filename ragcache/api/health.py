"""Readiness: recompute a stored chunk and compare it with the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ragcache.store.base import Miss

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.api.service import Service
    from ragcache.rag import RagCache
    from ragcache.store.key import ChunkKey

_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.1, "float16": 0.1}  # relative to the values' norm
_LOSSY_TOLERANCE = 0.3  # the same for lossy codecs
_MAX_HEADERS = 64  # to read until one is of a chunk that was computed without other chunks


class ReadinessCheck:
    """Compares a stored chunk with the KV that the engine computes for it now. Runs on the engine's
    thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.last: dict[str, Any] | None = None
        self.checked_at = 0.0  # of time.monotonic

    def run(self) -> dict[str, Any]:
        """``ok``, the tokens ``compared``, and the relative ``error``. Raises StoreError if the
        store cannot be read."""
        self.last, self.checked_at = self._compare(), time.monotonic()
        return self.last

    def _compare(self) -> dict[str, Any]:
        for cache in self._service.caches():
            key = _some_key(cache)
            if key is None:
                continue
            stored = cache.store.get(key)
            if isinstance(
                stored, Miss
            ):  # deleted meanwhile or damaged: a request would compute it again
                continue
            [fresh] = cache.engine.encode([key.tokens], context=key.context)
            error = max(map(_error, stored.values, fresh.values))
            limit = _TOLERANCE[cache.engine.spec.dtype] if key.codec == "raw" else _LOSSY_TOLERANCE
            return {"ok": error <= limit, "compared": len(key.tokens), "error": error}
        return {"ok": True, "compared": 0}


def _some_key(cache: RagCache) -> ChunkKey | None:
    """The key of a stored chunk that was computed after its key's context and no other chunks."""
    for header in cache.store.headers(most=_MAX_HEADERS):
        key = cache.indexing.key_of(header.tokens)
        if key.digest == header.key:
            return key
    return None


def _error(stored: Tensor, fresh: Tensor) -> float:
    fresh = fresh.float()
    return float((stored.float() - fresh).norm() / fresh.norm())
