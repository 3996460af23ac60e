"""What must hold of every fusion method, by value and in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ragcache.blend.base import Behind, Blender, KVPair, Layout, Selector
from ragcache.blend.fuse import FusionCallbacks
from ragcache.blend.prefix import Prefix
from ragcache.blend.reuse import Reuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.types import Prompt, Sampling
from tests import models
from tests.blend import scene
from tests.blend.matrix import AT_ONE, AT_ZERO, PARTIAL, label


@pytest.fixture(scope="module", params=["llama", "gemma2", "cohere2"])
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return models.engine(request.param)


@pytest.fixture(scope="module")
def llama() -> TransformersEngine:
    return models.engine("llama")


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blender", AT_ONE, ids=label)
def test_everything_recomputed_is_full_prefill(
    engine: TransformersEngine, blender: Blender
) -> None:
    want = scene.plain(engine, scene.PROMPT.tokens)
    fused = scene.run(engine, blender, room=8)
    close(fused.prefilled.logits, want)
    full = engine.prefill(scene.PROMPT.tokens, room=8)
    sampling = Sampling(max_tokens=8)
    tokens = [step.token for step in engine.decode(fused.prefilled, sampling)]
    assert tokens == [step.token for step in engine.decode(full, sampling)]


@pytest.mark.parametrize("blender", AT_ZERO, ids=label)
def test_nothing_recomputed_is_naive_reuse(llama: TransformersEngine, blender: Blender) -> None:
    fused = scene.run(llama, blender)
    assert fused.charged_budget == 0
    torch.testing.assert_close(
        fused.prefilled.logits, scene.run(llama, Reuse()).prefilled.logits, atol=0, rtol=0
    )


@pytest.mark.parametrize("blender", PARTIAL, ids=label)
def test_reuse_changes_the_answer_here(llama: TransformersEngine, blender: Blender) -> None:
    """The scene can tell: isolated chunks do not happen to give full prefill's logits."""
    want = scene.plain(llama, scene.PROMPT.tokens)
    assert (scene.run(llama, blender).prefilled.logits - want).norm() > 0.01 * want.norm()


@pytest.mark.parametrize("blender", AT_ONE + PARTIAL, ids=label)
def test_active_rows_shrink_and_hold_every_fresh_row(
    llama: TransformersEngine, blender: Blender, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    before = FusionCallbacks.before

    def watch(self: FusionCallbacks, layer: int, kv: object) -> Tensor:
        seen.append(before(self, layer, kv))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(FusionCallbacks, "before", watch)
    missing = () if blender.placement == "overlapping" else (1,)
    fused = scene.run(llama, blender, missing=missing)
    fresh = set(fused.layout.fresh.tolist())
    assert fresh >= set(range(scene.PROMPT.question_start, len(scene.PROMPT)))
    seen = seen[-llama.spec.layers :]  # a probe was before
    selector = blender.selector(fused.layout, llama.spec.layers)
    for layer, (rows, chosen) in enumerate(zip(seen, fused.chosen, strict=True)):
        alone = set() if selector.loads(layer) else set(range(len(scene.PREFIX)))  # not loaded
        assert set(rows.tolist()) == fresh | alone | set(chosen.tolist())
        assert set(chosen.tolist()) <= set(fused.layout.reusable.tolist())
        assert rows.tolist() == sorted(rows.tolist())
    assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("blender", [b for b in PARTIAL if b.placement == "consecutive"], ids=label)
def test_nothing_attends_to_the_future(llama: TransformersEngine, blender: Blender) -> None:
    """Change a later chunk's token: no KV row before it moves. The rows stay those of the first
    run, as other ones might be chosen after the change."""
    changed = scene.CHUNKS[:2] + ((*scene.CHUNKS[2][:4], 7, *scene.CHUNKS[2][5:]),)
    row = scene.PROMPT.spans[2][0] + 4
    first = scene.run(llama, blender)
    again = Replayed(first.chosen, blender.behind)
    a = first.prefilled.kv
    b = scene.run(llama, again, replace(scene.PROMPT, chunks=changed)).prefilled.kv
    for layer in range(llama.spec.layers):
        for x, y in zip(a.buffers(layer), b.buffers(layer), strict=True):
            close(x[:, :, :row], y[:, :, :row])
            assert not torch.allclose(x[:, :, row], y[:, :, row])


@dataclass(frozen=True)
class Replayed(Blender):
    """Computes given rows at every layer."""

    chosen: tuple[Tensor, ...]
    loads: Behind

    @property
    def behind(self) -> Behind:
        return self.loads

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _Replayed(self.chosen)


@dataclass
class _Replayed(Selector):
    chosen: tuple[Tensor, ...]

    def first(self) -> Tensor:
        return self.chosen[0]

    def narrows(self, layer: int) -> bool:
        return layer + 1 < len(self.chosen)

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        return self.chosen[layer + 1]


def test_layer_0_keys_from_the_store_are_the_computed_ones(llama: TransformersEngine) -> None:
    full = llama.prefill(scene.PROMPT.tokens).kv
    reused = scene.run(llama, Reuse()).prefilled.kv
    for x, y in zip(full.buffers(0), reused.buffers(0), strict=True):
        close(x[:, :, : len(scene.PROMPT)], y[:, :, : len(scene.PROMPT)])


def test_same_place_behind_the_same_prefix_is_exact(llama: TransformersEngine) -> None:
    prompt = Prompt(scene.PREFIX, scene.CHUNKS[:1], scene.QUESTION)
    fused = scene.run(llama, Reuse(), prompt)
    close(fused.prefilled.logits, scene.plain(llama, prompt.tokens))
    assert fused.charged_budget == 0


def test_prefix_mode_stays_exact_with_a_hole(llama: TransformersEngine) -> None:
    """The pipeline loads nothing behind the first miss; the rest is computed."""
    fused = scene.run(llama, Prefix(), missing=(1, 2))
    close(fused.prefilled.logits, scene.plain(llama, scene.PROMPT.tokens))
    assert fused.layout.reusable.tolist() == list(range(*scene.PROMPT.spans[0]))


@pytest.mark.parametrize("blender", AT_ONE, ids=label)
@pytest.mark.parametrize(
    "chunks",
    [(), scene.CHUNKS[:1], scene.CHUNKS[::-1], (scene.CHUNKS[0],) * 3],
    ids=["no chunk", "one chunk", "other order", "repeated chunk"],
)
def test_any_company_of_chunks(
    llama: TransformersEngine, blender: Blender, chunks: tuple[tuple[int, ...], ...]
) -> None:
    prompt = replace(scene.PROMPT, chunks=chunks)
    close(scene.run(llama, blender, prompt).prefilled.logits, scene.plain(llama, prompt.tokens))


def test_repeated_chunks_stand_at_their_own_places(llama: TransformersEngine) -> None:
    """Under partial recompute too, row by row: the copy is placed, not shared."""
    prompt = replace(scene.PROMPT, chunks=(scene.CHUNKS[0], scene.CHUNKS[0]))
    kv = scene.run(llama, Reuse(), prompt).prefilled.kv
    (a, b), (c, d) = prompt.spans
    keys, values = kv.buffers(1)
    assert torch.equal(values[:, :, a:b], values[:, :, c:d])
    assert not torch.allclose(keys[:, :, a:b], keys[:, :, c:d])


def test_overlapping_equals_attention_by_hand(llama: TransformersEngine) -> None:
    """Every chunk right behind the prefix, the question behind the longest: against the model
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
    layout = Layout(prompt, (False,) * 3, False, positions(prompt, "consecutive"))
    fused = fuse(llama, Prefix(), layout, scene.Held([]), capture=[2])
    behind = prompt.tokens[: prompt.spans[2][0]]
    want = llama.encode([prompt.chunks[2]], behind=behind)[0]
    for x, y in zip(fused.captured[0].keys, want.keys, strict=True):
        close(x, y)
    for x, y in zip(fused.captured[0].values, want.values, strict=True):
        close(x, y)
