"""Chunks encoded together equal chunks encoded one by one, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.onednn import SDPA
from ragcache.types import ChunkKV, Tokens
from tests import models
from tests.engine.hf.test_architectures import ARCHITECTURES

#: Some longer than the windows of 16, one of a single token; together longer than a context of 64.
CHUNKS: list[Tokens] = [
    tuple(range(3, 43)),
    (7,),
    tuple(range(50, 75)),
    (9, 10),
    tuple(range(100, 140)),
]
BEHIND = tuple(range(200, 223))


def alone(engine: TransformersEngine, context: Tokens) -> list[ChunkKV]:
    """A forward for every chunk, whose attention nothing touches."""
    return [engine.encode([chunk], context=context)[0] for chunk in CHUNKS]


def assert_same(got: list[ChunkKV], want: list[ChunkKV]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.tokens == other.tokens
        for a, b in zip(one.keys + one.values, other.keys + other.values, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_together_as_alone(architecture: str, attention: str) -> None:
    try:
        engine = models.engine(architecture, attention=attention, max_position_embeddings=64)
    except ValueError as error:  # transformers refuses SDPA for some architectures
        assert attention == "sdpa" and "scaled_dot_product_attention" in str(error)
        pytest.skip(f"{architecture} has no SDPA")
    assert engine.packs_chunks
    for behind in ((), (5,), BEHIND):
        assert_same(engine.encode(CHUNKS, context=behind), alone(engine, behind))
    assert engine.model.config._attn_implementation in (
        SDPA if attention == "sdpa" else (attention,)
    )


def test_a_chunk_behind_others_is_the_end_of_a_prefill() -> None:
    """Compared with the last rows of a plain forward over all tokens."""
    engine = models.engine("gemma3_text")
    [*_, last] = engine.encode(CHUNKS, context=BEHIND)
    whole = engine.encode([BEHIND + CHUNKS[-1]])[0]
    for part, all_rows in zip(last.keys + last.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(part, all_rows[:, len(BEHIND) :], atol=2e-5, rtol=2e-5)


def test_no_chunks_are_no_kv() -> None:
    assert models.engine("llama").encode([], context=BEHIND) == []


def test_attention_that_does_not_come_by_is_not_packed() -> None:
    """One layer asks a configuration of its own how to attend, and so is never detoured."""
    model = models.model("llama")
    attention = model.model.layers[2].self_attn
    attention.config = copy.deepcopy(attention.config)
    engine = TransformersEngine(model, models.tokenizer(), name="llama")
    assert not engine.packs_chunks
    for behind in ((), BEHIND):
        assert_same(engine.encode(CHUNKS, context=behind), alone(models.engine("llama"), behind))


def test_what_chunks_stand_behind_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = models.engine("llama"), list[int]()
    engine.model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    first = engine.encode(CHUNKS[:2], context=BEHIND)
    engine.encode(CHUNKS, context=BEHIND * 2)
    again = engine.encode(CHUNKS[:2], context=BEHIND)
    assert sizes == [23, 41, 46, 108, 41]
    assert_same(again, first)
    engine.encode(CHUNKS[:1], context=(1,))  # a third: the least recently used one is dropped
    engine.encode(CHUNKS[:1], context=BEHIND)
    engine.encode(CHUNKS[:1], context=BEHIND * 2)
    assert sizes[5:] == [1, 40, 40, 46, 40]
