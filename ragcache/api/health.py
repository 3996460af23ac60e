"""Is the service ready? A stored chunk is recomputed and compared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ragcache.store.base import Miss

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.api.service import Service
    from ragcache.rag import RagCache
    from ragcache.store.key import ChunkKey

_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.1, "float16": 0.1}  # relative, of the values' norm
_LOSSY = 0.3  # the same, where a codec leaves something out
_LOOK_AT = 64  # stored chunks, to find one that was computed by itself


class Check:
    """Compares a stored chunk with what the engine makes of it now. For the engine's thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.last: dict[str, Any] | None = None
        self.at = 0.0  # of time.monotonic, of the last

    def run(self) -> dict[str, Any]:
        """``ok``, and what was compared. StoreError where the store cannot be read."""
        self.last, self.at = self._compare(), time.monotonic()
        return self.last

    def _compare(self) -> dict[str, Any]:
        for cache in self._service.caches():
            key = _some_key(cache)
            if key is None:
                continue
            stored = cache.store.get(key)
            if isinstance(stored, Miss):  # it went, or is damaged: it would be computed anew
                continue
            [fresh] = cache.engine.encode([key.tokens], context=key.context)
            error = max(map(_error, stored.values, fresh.values))
            limit = _TOLERANCE[cache.engine.spec.dtype] if key.codec == "raw" else _LOSSY
            return {"ok": error <= limit, "compared": len(key.tokens), "error": error}
        return {"ok": True, "compared": 0}


def _some_key(cache: RagCache) -> ChunkKey | None:
    """The key of some stored chunk of this model; None if there is none."""
    for header in cache.store.headers(most=_LOOK_AT):
        key = cache.indexing.key_of(header.tokens)
        if key.digest == header.key:
            return key
    return None


def _error(stored: Tensor, fresh: Tensor) -> float:
    fresh = fresh.float()
    return float((stored.float() - fresh).norm() / fresh.norm())
