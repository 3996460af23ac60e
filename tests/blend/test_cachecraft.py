"""Cache-Craft's formulas against explicit sums, and its variants over several prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ragcache.blend.cachecraft import CacheCraft, _leading, _overlap
from ragcache.blend.reuse import Reuse
from ragcache.core.precompute import MAX_VARIANTS
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.rag import RagCache
from ragcache.store.key import ChunkKey, digest_tokens
from ragcache.types import ChunkNotes, Prompt
from tests import models
from tests import scene as small
from tests.blend import scene

A, B, C = b"a", b"b", b"c"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", attention="eager")


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ((), 0),  # none of its preceding chunks is there
        ((A, B, C), 1),
        ((C, B, A), 0),  # all pairs have changed their order
        ((A, B), 0.75),
        ((A, C, B), 1 - 1 / 3),
        ((C,), 0.25),
        ((b"x", A, b"y", B, C), 1),  # who is new counts for nothing
    ],
)
def test_overlap_weighs_chunks_by_attention(before: tuple[bytes, ...], expected: float) -> None:
    assert _overlap({A: 2, B: 1, C: 1}, before, exact=False) == pytest.approx(expected)


def test_a_chunk_that_met_nobody_is_right_only_behind_the_same_text() -> None:
    assert _overlap({}, (), exact=True) == 1
    assert _overlap({}, (), exact=False) == _overlap({}, (A,), exact=False) == 0


def test_overhead_is_alpha_times_impact_times_what_changed() -> None:
    notes = ChunkNotes((A, B), (3.0, 1.0), (0.0, 4.0), impact=0.8)
    assert CacheCraft(alpha=0.5).fix(notes, (A,)) == pytest.approx(0.5 * 0.8 * 0.25)
    assert CacheCraft(alpha=9).fix(notes, ()) == 1
    assert CacheCraft(alpha=0.5, renew=0.3).overhead(notes, ()) is None
    assert CacheCraft(alpha=0.5, renew=0.4).overhead(notes, ()) == pytest.approx(0.4)


def test_notes_are_sums_of_the_models_own_attention(engine: TransformersEngine) -> None:
    _, [notes, *_] = scene.variants(engine, scene.PROMPT)
    chunk = scene.CHUNKS[0]
    met = Prompt.of(scene.PREFIX, (scene.STRANGER, chunk), scene.QUESTION)
    with torch.inference_mode():
        out = engine.model(torch.tensor([met.tokens]), output_attentions=True)
    weights = torch.stack([layer[0] for layer in out.attentions]).sum(1)  # (layers, rows, keys)
    (low, high), (start, end) = met.spans
    between = weights[:, start:end, low:high]
    within = weights[:, start:end, start:end].tril(-1)
    assert notes.before == (digest_tokens(scene.STRANGER),)
    assert notes.inter == pytest.approx([float(between.sum())], rel=1e-4)
    torch.testing.assert_close(torch.tensor(notes.per_token), between.sum((0, 2)))
    n, m = end - start, high - low
    ratio = float(between.sum() / (n * m) / (within.sum() / n**2))
    assert notes.impact == pytest.approx(1 / (1 + math.exp(-ratio)), rel=1e-4)


def test_rows_are_those_that_looked_out_most(engine: TransformersEngine) -> None:
    _, notes = scene.variants(engine, scene.PROMPT)
    blender = CacheCraft(alpha=0.4, focus=False)
    want = []
    for (start, end), seen in zip(scene.PROMPT.spans, notes, strict=True):
        count = math.ceil(0.4 * seen.impact * (end - start))
        order = sorted(range(end - start), key=lambda k: -seen.per_token[k])
        want += sorted(start + k for k in order[:count])
    assert scene.run(engine, blender).chosen[0].tolist() == want


def test_at_alpha_0_variants_are_reused_as_they_are(engine: TransformersEngine) -> None:
    fused = scene.run(engine, CacheCraft(alpha=0))
    assert fused.charged_budget == 0
    cut, _ = scene.variants(engine, scene.PROMPT)
    _, values = fused.prefilled.kv.buffers(2)
    for (start, end), kv in zip(scene.PROMPT.spans, cut, strict=True):
        torch.testing.assert_close(values[0, :, start:end], kv.values[2])
    assert scene.run(engine, Reuse()).charged_budget == 0


def test_focus_drops_rows_of_chunks_that_the_question_ignores(engine: TransformersEngine) -> None:
    wide = scene.run(engine, CacheCraft(alpha=0.6, focus=False)).chosen
    narrow = scene.run(engine, CacheCraft(alpha=0.6, patience=1)).chosen
    assert torch.equal(wide[0], narrow[0])
    assert len(narrow[-1]) < len(wide[-1])
    assert set(narrow[-1].tolist()) <= set(wide[-1].tolist())


def test_leading_chunks_are_above_the_largest_relative_gap() -> None:
    assert _leading(torch.tensor([0.1, 0.9, 0.8, 0.09])) == {1, 2}
    assert _leading(torch.tensor([0.5])) == {0}
    assert _leading(torch.tensor([])) == frozenset()


QUESTION = "Where does Mira Holt live?"


@pytest.fixture
def cache(tmp_path: Path) -> RagCache:
    return small.small(tmp_path)


def test_variants_come_with_use(cache: RagCache) -> None:
    """The first prompt computes its chunks; the same one again costs nothing; others in part."""
    texts = [document.text for document in small.DOCUMENTS]
    mode = CacheCraft(alpha=0.5)
    first = cache.ask(QUESTION, mode=mode, chunks=texts)
    assert {chunk.miss for chunk in first.report.chunks} == {"absent"}
    assert "no variant: computed, and kept as one" in first.report.fallbacks[0]
    again = cache.ask(QUESTION, mode=mode, chunks=texts)
    assert again.report.charged_share == 0
    assert again.tokens == first.tokens == cache.ask(QUESTION, mode="full", chunks=texts).tokens
    turned = cache.ask(QUESTION, mode=mode, chunks=texts[::-1]).report
    assert 0 < turned.charged_share < 0.5
    cache.close()


def test_a_costly_variant_is_renewed_and_the_least_worth_goes(cache: RagCache) -> None:
    texts = [document.text for document in small.DOCUMENTS]
    mode = CacheCraft(alpha=0.5, renew=0.01)
    tokens = cache.engine.template.chunk(texts[0])
    key = ChunkKey(cache.engine.fingerprint, tokens)
    for number in range(MAX_VARIANTS + 2):
        cache.ask(QUESTION, mode=mode, chunks=[f"Company {number} is new here.", texts[0]])
        cache.ask(QUESTION, mode=mode, chunks=["Company 0 is new here.", texts[0]])
    kept = cache.store.variants.find(key)
    assert len(kept) == MAX_VARIANTS
    assert max(variant.score for variant in kept) > 0
    mine = digest_tokens(cache.engine.template.chunk("Company 0 is new here."))
    assert any(variant.notes.before == (mine,) for variant in kept)  # it was worth most
    cache.close()


def test_a_variant_that_rots_is_computed_again(cache: RagCache) -> None:
    texts = [document.text for document in small.DOCUMENTS]
    first = cache.ask(QUESTION, mode="cachecraft", chunks=texts)
    [variant] = cache.store.variants.find(
        ChunkKey(cache.engine.fingerprint, cache.engine.template.chunk(texts[1]))
    )
    with cache.store.tables.write() as txn:
        row = variant.stored.key.digest + (2).to_bytes(2, "big")
        record = txn.get("layers", row)
        assert record is not None
        txn.put("layers", row, record[:-1] + bytes([record[-1] ^ 1]))
    report = cache.ask(QUESTION, mode="cachecraft", chunks=texts).report
    assert report.chunks[1].miss == "corrupt"
    assert any("chunk 2 was recomputed" in note for note in report.fallbacks)
    healed = cache.ask(QUESTION, mode="cachecraft", chunks=texts)
    assert healed.report.charged_share == 0 and healed.tokens == first.tokens
    cache.close()


def test_a_variant_whose_notes_rot_is_a_miss(cache: RagCache) -> None:
    texts = [document.text for document in small.DOCUMENTS]
    first = cache.ask(QUESTION, mode="cachecraft", chunks=texts)
    chunk = ChunkKey(cache.engine.fingerprint, cache.engine.template.chunk(texts[1]))
    [variant] = cache.store.variants.find(chunk)
    with cache.store.tables.write() as txn:
        record = txn.get("variants", variant.stored.key.digest)
        assert record is not None
        txn.put("variants", variant.stored.key.digest, record[:-1] + b"!")
    again = cache.ask(QUESTION, mode="cachecraft", chunks=texts)
    assert [c.miss for c in again.report.chunks] == [None, "corrupt", None]
    assert again.tokens == first.tokens
    assert len(cache.store.variants.find(chunk)) == 1
    cache.close()


def test_another_models_variants_are_not_served(cache: RagCache) -> None:
    texts = [document.text for document in small.DOCUMENTS]
    cache.ask(QUESTION, mode="cachecraft", chunks=texts)
    fingerprint = replace(cache.engine.fingerprint, fields=(("weights", "other"),))
    for text in texts:
        assert (
            cache.store.variants.find(ChunkKey(fingerprint, cache.engine.template.chunk(text)))
            == []
        )
    cache.close()
