"""The contract tests for every fusion method, and fusion itself, by value and in float32."""

from __future__ import annotations

import pytest
import torch

from ragcache.blend.base import Blender, Layout
from ragcache.blend.prefix import Prefix
from ragcache.blend.reuse import Reuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.testing.blender import BlenderTests, close
from ragcache.types import Prompt
from tests import models
from tests.blend import scene
from tests.blend.matrix import AT_ONE, AT_ZERO, PARTIAL, label


class TestEveryMethod(BlenderTests):
    nothing, everything, partial = AT_ZERO, AT_ONE, PARTIAL


@pytest.fixture(scope="module", params=["gemma2", "cohere2"])
def other(request: pytest.FixtureRequest) -> TransformersEngine:
    """With sliding windows, soft caps, and layers without RoPE."""
    return models.engine(request.param)


@pytest.mark.parametrize("blender", AT_ONE, ids=label)
def test_everything_recomputed_is_full_prefill_of_other_models(
    other: TransformersEngine, blender: Blender
) -> None:
    want = scene.plain(other, scene.PROMPT.tokens)
    close(scene.run(other, blender).prefilled.logits, want)


@pytest.fixture(scope="module")
def llama() -> TransformersEngine:
    return models.engine("llama")


def test_layer_0_keys_from_the_store_are_the_computed_ones(llama: TransformersEngine) -> None:
    full = llama.prefill(scene.PROMPT.tokens).kv
    reused = scene.run(llama, Reuse()).prefilled.kv
    for x, y in zip(full.buffers(0), reused.buffers(0), strict=True):
        close(x[:, :, : len(scene.PROMPT)], y[:, :, : len(scene.PROMPT)])


def test_same_place_behind_the_same_prefix_is_exact(llama: TransformersEngine) -> None:
    prompt = Prompt.of(scene.PREFIX, scene.CHUNKS[:1], scene.QUESTION)
    fused = scene.run(llama, Reuse(), prompt)
    close(fused.prefilled.logits, scene.plain(llama, prompt.tokens))
    assert fused.charged_budget == 0


def test_prefix_mode_stays_exact_with_a_hole(llama: TransformersEngine) -> None:
    """Nothing after the first miss is loaded; the rest is computed."""
    fused = scene.run(llama, Prefix(), missing=(1, 2))
    close(fused.prefilled.logits, scene.plain(llama, scene.PROMPT.tokens))
    assert fused.layout.reusable.tolist() == list(range(*scene.PROMPT.spans[0]))


def test_repeated_chunks_stand_at_their_own_places(llama: TransformersEngine) -> None:
    """Under partial recompute too, row by row: the copy is placed, not shared."""
    prompt = Prompt.of(scene.PREFIX, scene.CHUNKS[:1] * 2, scene.QUESTION)
    kv = scene.run(llama, Reuse(), prompt).prefilled.kv
    (a, b), (c, d) = prompt.spans
    keys, values = kv.buffers(1)
    assert torch.equal(values[:, :, a:b], values[:, :, c:d])
    assert not torch.allclose(keys[:, :, a:b], keys[:, :, c:d])


def test_overlapping_equals_attention_by_hand(llama: TransformersEngine) -> None:
    """Every chunk right after the prefix, the question after the longest: against the model
    itself under a block mask with those positions."""
    prompt = scene.PROMPT
    fused = scene.run(llama, Reuse("overlapping"))
    part = torch.tensor(
        [-1] * len(prompt.prefix)
        + [i for i, chunk in enumerate(prompt.chunks) for _ in chunk]
        + [-2] * len(prompt.question)
    )
    row, col = part[:, None], part[None]
    mask = (row == -2) | (col == -1) | (row == col)
    mask &= torch.ones_like(mask).tril()
    with torch.inference_mode():
        want = llama.model(
            torch.tensor([prompt.tokens]),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([fused.layout.positions]),
        ).logits[0, -1]
    close(fused.prefilled.logits, want)
    start = len(prompt.prefix) + max(map(len, prompt.chunks))
    assert fused.layout.positions[prompt.question_start] == start
    assert fused.prefilled.next_position == start + len(prompt.question)


def test_captured_chunks_are_what_a_whole_prefill_holds(llama: TransformersEngine) -> None:
    from ragcache.blend.base import positions
    from ragcache.blend.fuse import fuse

    prompt = scene.PROMPT
    layout = Layout(prompt, (False,) * 3, 0, positions(prompt, "consecutive"))
    fused = fuse(llama, Prefix(), layout, scene.Held([]), capture=[2])
    behind = prompt.tokens[: prompt.spans[2][0]]
    want = llama.encode([prompt.chunks[2]], context=behind)[0]
    for x, y in zip(fused.captured[0].keys, want.keys, strict=True):
        close(x, y)
    for x, y in zip(fused.captured[0].values, want.values, strict=True):
        close(x, y)
