"""How much a token depends on what stands before its chunk, by value."""

from __future__ import annotations

import pytest
import torch

from ragcache.engine.transformers import TransformersEngine
from ragcache.precompute import precompute
from ragcache.sensitivity import company, measured
from ragcache.store.base import Stored
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from tests import models

BEHIND = (1, 5, 9)
CHUNKS = [tuple(range(10, 22)), tuple(range(30, 47))]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6, max_position_embeddings=1024)


def test_it_is_the_squared_change_of_the_values(engine: TransformersEngine) -> None:
    """Written out, from a full prefill of the company and the chunk."""
    alone = engine.encode(CHUNKS, behind=BEHIND)
    for kv, chunk in zip(measured(engine, alone, BEHIND), CHUNKS, strict=True):
        whole = engine.prefill(BEHIND + company(engine) + chunk).kv
        want = torch.zeros(len(chunk))
        for layer in (2, 3):  # the middle third of six
            moved = whole.buffers(layer)[1][0, :, -1 - len(chunk) : -1]
            own = engine.prefill(BEHIND + chunk).kv.buffers(layer)[1][0, :, len(BEHIND) : -1]
            change = (moved - own).square().sum((0, 2))
            want += change / own.square().sum((0, 2)).mean() / 2
        torch.testing.assert_close(torch.tensor(kv.sensitivity), want, atol=1e-5, rtol=1e-4)
        assert min(kv.sensitivity) > 0


def test_no_room_for_company_is_no_sensitivity() -> None:
    engine = models.engine("llama", max_position_embeddings=64)
    chunk = tuple(range(64 - len(BEHIND)))
    [kv] = measured(engine, engine.encode([chunk], behind=BEHIND), BEHIND)
    assert max(kv.sensitivity) < 1e-9


def test_it_is_stored_with_every_chunk_that_is_precomputed(engine: TransformersEngine) -> None:
    store = MemoryStore()
    key = ChunkKey(engine.fingerprint, CHUNKS[0], BEHIND)
    precompute(engine, store, [key])
    found = store.find(key)
    [want] = measured(engine, engine.encode([CHUNKS[0]], behind=BEHIND), BEHIND)
    assert isinstance(found, Stored) and found.sensitivity == want.sensitivity
