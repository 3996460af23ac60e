"""How much a token depends on what precedes its chunk, by value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ragcache.core.precompute import precompute
from ragcache.core.sensitivity import measure_sensitivity, preceding_passage
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.store.base import StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import ChunkKV
from tests import models, scene

BEHIND = (1, 5, 9)
CHUNKS = [tuple(range(10, 22)), tuple(range(30, 47))]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6, max_position_embeddings=1024)


def test_it_is_the_squared_change_of_the_values(engine: TransformersEngine) -> None:
    """Written out, from a full prefill of the passage and the chunk."""
    alone = engine.encode(CHUNKS, context=BEHIND)
    for kv, chunk in zip(measure_sensitivity(engine, alone, BEHIND), CHUNKS, strict=True):
        whole = engine.prefill(BEHIND + preceding_passage(engine) + chunk).kv
        want = torch.zeros(len(chunk))
        for layer in (2, 3):  # the middle third of six
            moved = whole.buffers(layer)[1][0, :, -1 - len(chunk) : -1]
            own = engine.prefill(BEHIND + chunk).kv.buffers(layer)[1][0, :, len(BEHIND) : -1]
            change = (moved - own).square().sum((0, 2))
            want += change / own.square().sum((0, 2)).mean() / 2
        torch.testing.assert_close(torch.tensor(kv.sensitivity), want, atol=1e-5, rtol=1e-4)
        assert min(kv.sensitivity) > 0


@pytest.mark.parametrize("room", [0, 1, 2, 40, 300, 500])
def test_the_context_makes_room_for_the_passage(engine: TransformersEngine, room: int) -> None:
    """A chunk that fills the model's context has a sensitivity all the same."""
    context, passage = tuple(range(20, 60)) * 10, preceding_passage(engine)
    chunk = (7, 8) * ((engine.context_tokens - room) // 2) + (9,) * (room % 2)
    before = context[:room]
    [kv] = measure_sensitivity(engine, engine.encode([chunk], context=before), before)
    share = min(len(passage), max(room // 2, room - len(before)))
    met = before[: room - share] + passage[len(passage) - share :]
    assert len(met) == room
    layers = (2, 3)  # the middle third of six
    a, b = (engine.encode([chunk], context=each)[0].values for each in (before, met))
    want = [(a[i] - b[i]).square().sum((0, 2)) / a[i].square().sum((0, 2)).mean() for i in layers]
    torch.testing.assert_close(
        torch.tensor(kv.sensitivity), torch.stack(want).mean(0), atol=1e-6, rtol=1e-4
    )
    assert (min(kv.sensitivity) > 0) == (room > 1)


def test_a_chunk_that_is_stored_without_it_is_computed_anew(engine: TransformersEngine) -> None:
    store = MemoryStore()
    keys = [ChunkKey(engine.fingerprint, chunk, BEHIND) for chunk in CHUNKS]
    precompute(engine, store, keys)
    whole = store.get(keys[1])
    assert isinstance(whole, ChunkKV)
    store.put(keys[1], replace(whole, sensitivity=()))
    done = precompute(engine, store, keys)
    assert (done.encoded, done.stored) == (1, 1)
    again = store.get_header(keys[1])
    assert isinstance(again, StoredChunk) and again.sensitivity == pytest.approx(whole.sensitivity)
    assert precompute(engine, store, keys).encoded == 0


def test_what_prefix_caching_stores_has_it(tmp_path: Path) -> None:
    """The first chunk of a prompt is stored under the key that every other method asks for."""
    texts = [document.text for document in scene.DOCUMENTS]
    with scene.small(tmp_path, encoding_context="prefix") as cache:
        cache.ask("Who?", mode="prefix", chunks=texts)
        first = cache.engine.template.chunk(texts[0])
        found = cache.store.get_header(cache.indexing.key_of(first))
        assert isinstance(found, StoredChunk) and len(found.sensitivity) == len(first)
        cache.ask("Who?", mode="fused", chunks=texts)  # which stores the others
        answer = cache.ask("Who?", mode="fused", chunks=texts, ratio=0.3)
        assert answer.report.chunks[0].recomputed == 0  # it stands as it was computed
        answer = cache.ask("Who?", mode="fused", chunks=texts[::-1], ratio=0.3)
        assert not answer.report.fallbacks
        assert all(chunk.recomputed for chunk in answer.report.chunks[1:])


@pytest.mark.parametrize("ram_bytes", [0, 1 << 24])
def test_a_chunk_of_an_old_store_is_measured_after_its_first_answer(
    tmp_path: Path, ram_bytes: int
) -> None:
    texts = [document.text for document in scene.DOCUMENTS]
    with scene.small(tmp_path, ram_bytes=ram_bytes, encoding_context="prefix") as cache:
        cache.ask("Who?", chunks=texts)
        keys = [cache.indexing.key_of(cache.engine.template.chunk(text)) for text in texts]
        for key in keys[:2]:
            kv = cache.store.get(key)
            assert isinstance(kv, ChunkKV)
            cache.chunks.put(key, replace(kv, sensitivity=()))
        first = cache.ask("Who?", chunks=texts)
        assert first.report.fallbacks == (
            "1 of 3 chunks are stored without their tokens' sensitivity: those were ranked as "
            "average",
        )
        assert first.report.chunks[0].recomputed == 0  # exact where it stands, measured or not
        second = cache.ask("Who?", chunks=texts)
        assert second.report.fallbacks == ()
        assert all(
            isinstance(f := cache.store.get_header(k), StoredChunk) and f.sensitivity for k in keys
        )


def test_it_is_stored_with_every_chunk_that_is_precomputed(engine: TransformersEngine) -> None:
    store = MemoryStore()
    key = ChunkKey(engine.fingerprint, CHUNKS[0], BEHIND)
    precompute(engine, store, [key])
    found = store.get_header(key)
    [want] = measure_sensitivity(engine, engine.encode([CHUNKS[0]], context=BEHIND), BEHIND)
    assert isinstance(found, StoredChunk) and found.sensitivity == want.sensitivity
