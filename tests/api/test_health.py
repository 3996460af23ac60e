"""Readiness: the service is not ready if stored KV differs from what the model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ragcache.types import ChunkKV
from tests import scene
from tests.api.conftest import ANN, served


def test_a_chunk_that_is_not_what_the_model_computes(tmp_path: Path) -> None:
    with served(tmp_path / "store") as one, one.client(ANN) as ann:
        cache = one.service.cache("ann")
        cache.add(scene.DOCUMENTS)
        for key in [
            key for document in scene.DOCUMENTS for key in cache.indexing.keys(document.id)
        ]:
            kv = cache.store.get(key)
            assert isinstance(kv, ChunkKV)
            cache.store.put(key, replace(kv, values=tuple(value + 1 for value in kv.values)))
        answer = ann.get("/ready")
        assert answer.status_code == 503 and "Try again later" in answer.json()["error"]["message"]
