"""Tests of the contract of a fusion method: the rows that it computes, and the resulting logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ragcache.blend.base import Blender, Layout, ReusedKV, Selector, positions
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.blend.reuse import Reuse
from ragcache.engine.base import (
    AttentionRule,
    ComputeRows,
    Engine,
    LayerView,
    PrefillCallbacks,
    Prefilled,
    Prefiller,
)
from ragcache.store.key import digest_tokens
from ragcache.testing import models
from ragcache.types import ChunkKV, ChunkNotes, KVPair, LayerLoad, Prompt, Sampling, Tokens

__all__ = ["BlenderTests", "PROMPT"]

PREFIX: Tokens = (1, 5, 9)
CHUNKS: tuple[Tokens, ...] = (tuple(range(10, 22)), tuple(range(30, 47)), tuple(range(60, 69)))
QUESTION: Tokens = (100, 101, 102, 103)
PROMPT = Prompt.of(PREFIX, CHUNKS, QUESTION)
SENSITIVITIES = tuple(tuple(token * 37 % 101 / 8 for token in chunk) for chunk in CHUNKS)
STRANGER: Tokens = tuple(range(200, 214))  # a chunk that is not in PROMPT


class MemorySource:
    """A :class:`~ragcache.blend.base.KVSource` of KV in memory, which records the layers read."""

    def __init__(self, parts: Sequence[ChunkKV]) -> None:
        self.parts = parts
        self.asked: list[int] = []

    def start(self, layers: Sequence[int]) -> None:
        self.to_come = list(layers)

    def layer(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        assert layer == self.to_come.pop(0), "layers are asked for in order, once each"
        self.asked.append(layer)
        return [(p.keys[layer], p.values[layer]) for p in self.parts]

    def load(self, layer: int) -> LayerLoad:
        return LayerLoad(sum(p.keys[layer].nbytes + p.values[layer].nbytes for p in self.parts))


def encoded(engine: Prefiller, prompt: Prompt, blender: Blender) -> list[ChunkKV]:
    """KV of the prefix and of every chunk, computed in the context that ``blender`` reuses."""
    parts, context = engine.encode([prompt.prefix]), prompt.prefix
    for chunk in prompt.chunks:
        parts += engine.encode([chunk], context=context)
        if blender.reuses == "in_context":
            context += chunk
    return parts


def variants(engine: Prefiller, prompt: Prompt) -> tuple[list[ChunkKV], list[ChunkNotes]]:
    """Variants of every chunk: KV from a prompt in which it follows a chunk not in ``prompt``."""
    cut: list[ChunkKV] = []
    seen: list[ChunkNotes] = []
    for chunk in prompt.chunks:
        met = Prompt.of(prompt.prefix, (STRANGER, chunk), QUESTION)
        names = tuple(map(digest_tokens, met.chunks))
        layout = Layout(met, (False, False), 0, tuple(range(len(met))), (), names)
        fused = fuse(engine, CacheCraft(), layout, MemorySource([]), capture=[1])
        cut += fused.captured
        seen += fused.notes
    return cut, seen


def run(
    engine: Prefiller,
    blender: Blender,
    prompt: Prompt = PROMPT,
    *,
    missing: Sequence[int] = (),
    room: int = 1,
) -> FusedPrompt:
    """Fuse ``prompt``, for which everything is stored except the chunks numbered ``missing``."""
    prefix, *chunks = encoded(engine, prompt, blender)
    notes: list[ChunkNotes] = []
    if blender.reuses == "variant":
        chunks, notes = variants(engine, prompt)
    stored = blender.reuses != "nothing"
    loaded = tuple(stored and i not in missing for i in range(len(chunks)))
    parts = [prefix] * stored + [c for c, here in zip(chunks, loaded, strict=True) if here]
    place = positions(prompt, blender.placement)
    names = tuple(map(digest_tokens, prompt.chunks))
    sensitive = SENSITIVITIES if prompt == PROMPT else ()
    exact = tuple(
        blender.reuses == "in_context" or (blender.reuses == "encoded" and not i)
        for i in range(len(chunks))
    )
    layout = Layout(prompt, loaded, int(stored), place, tuple(notes), names, sensitive, exact=exact)
    return fuse(engine, blender, layout, MemorySource(parts), room=room)


def label(blender: Blender) -> str:
    """A readable test id."""
    parameters = ",".join(f"{k}={v}" for k, v in blender.parameters.items())
    return f"{blender.mode}({parameters})"


def close(got: Tensor, want: Tensor) -> None:
    """Raise AssertionError unless both are equal up to rounding in float32."""
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class BlenderTests:
    """Tests of a :class:`~ragcache.blend.base.Blender`, in float32.

    A subclass lists blenders of the method: ``partial``, and, if the method has such parameters,
    ``nothing`` and ``everything``. They run on a random model; override :meth:`engine` for another.
    """

    #: With nothing recomputed: must equal naive reuse.
    nothing: ClassVar[Sequence[Blender]] = ()
    #: With everything recomputed: must equal full prefill.
    everything: ClassVar[Sequence[Blender]] = ()
    #: In between: some rows are recomputed, and the answer is not full prefill's.
    partial: ClassVar[Sequence[Blender]] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        """The model to test with. Its KV of a chunk must depend on what precedes the chunk."""
        return models.engine("llama")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        lists = {
            "without": self.nothing,
            "complete": self.everything,
            "between": self.partial,
            "blender": (*self.everything, *self.partial),
        }
        for name in lists.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(name, lists[name], ids=label)

    def test_blenders_are_listed(self) -> None:
        listed = (*self.nothing, *self.everything, *self.partial)
        assert listed, "list blenders of the method in nothing, everything and partial"

    def test_everything_recomputed_is_full_prefill(self, engine: Engine, complete: Blender) -> None:
        fused = run(engine, complete, room=8)
        full = engine.prefill(PROMPT.tokens, room=8)
        close(fused.prefilled.logits, full.logits)
        sampling = Sampling(max_tokens=8)
        tokens = [step.token for step in engine.decode(fused.prefilled, sampling)]
        assert tokens == [step.token for step in engine.decode(full, sampling)]

    @pytest.mark.parametrize(
        "chunks",
        [(), CHUNKS[:1], CHUNKS[::-1], (CHUNKS[0],) * 3],
        ids=["no chunk", "one chunk", "other order", "repeated chunk"],
    )
    def test_everything_recomputed_is_full_prefill_of_any_chunks(
        self, engine: Engine, complete: Blender, chunks: tuple[Tokens, ...]
    ) -> None:
        prompt = Prompt.of(PREFIX, chunks, QUESTION)
        want = engine.prefill(prompt.tokens).logits
        close(run(engine, complete, prompt).prefilled.logits, want)

    def test_nothing_recomputed_is_naive_reuse(self, engine: Engine, without: Blender) -> None:
        fused = run(engine, without)
        assert fused.charged_budget == 0
        want = run(engine, Reuse()).prefilled.logits
        torch.testing.assert_close(fused.prefilled.logits, want, atol=0, rtol=0)

    def test_reuse_changes_the_answer_here(self, engine: Engine, between: Blender) -> None:
        """With this prompt, partial recomputation does not give the logits of full prefill."""
        want = engine.prefill(PROMPT.tokens).logits
        assert (run(engine, between).prefilled.logits - want).norm() > 0.01 * want.norm()

    def test_rows_are_sorted_unique_and_only_shrink(self, engine: Engine, blender: Blender) -> None:
        missing = () if blender.placement == "overlapping" else (1,)
        seen = _Watched(engine)
        fused = run(seen, blender, missing=missing)
        fresh = set(fused.layout.fresh.tolist())
        assert fresh >= set(range(PROMPT.question_start, len(PROMPT)))
        layers = engine.spec.layers
        selector = blender.selector(fused.layout, layers)
        rows = seen.rows[-layers:]
        for layer, (computed, chosen) in enumerate(zip(rows, fused.chosen, strict=True)):
            alone = set() if selector.loads(layer) else set(range(len(PREFIX)))  # not loaded
            assert set(computed) == fresh | alone | set(chosen.tolist())
            assert set(chosen.tolist()) <= set(fused.layout.reusable.tolist())
            assert computed == sorted(set(computed))
        assert all(set(b) <= set(a) for a, b in zip(rows, rows[1:], strict=False))
        assert 0 <= fused.charged_budget <= 1 or fused.again

    def test_the_same_prompt_has_the_same_rows(self, engine: Engine, between: Blender) -> None:
        first, again = run(engine, between), run(engine, between)
        assert all(map(torch.equal, first.chosen, again.chosen))
        assert torch.equal(first.prefilled.logits, again.prefilled.logits)

    def test_a_probe_only_chooses(self, engine: Engine, between: Blender) -> None:
        """The same rows without a probe have the same logits, whether it has placed all rows of the
        prompt, or some."""
        if not run(engine, between).probed:
            pytest.skip("the method has no probe")
        for missing in ((), (1,)):
            fused = run(engine, between, missing=missing)
            again = run(engine, _Replayed(fused.chosen, between.reuses), missing=missing)
            torch.testing.assert_close(
                fused.prefilled.logits, again.prefilled.logits, atol=0, rtol=0
            )

    def test_nothing_attends_to_the_future(self, engine: Engine, between: Blender) -> None:
        """If a token of a later chunk changes, the KV of no earlier row does. The second run
        computes the rows of the first, since the method might choose others after the change."""
        if between.placement == "overlapping":
            pytest.skip("rows of overlapping chunks are not in the order of their positions")
        changed = CHUNKS[:2] + ((*CHUNKS[2][:4], 7, *CHUNKS[2][5:]),)
        row = PROMPT.spans[2][0] + 4
        seen = _Watched(engine)
        first = run(seen, between)
        before = seen.kv[-engine.spec.layers :]
        run(seen, _Replayed(first.chosen, between.reuses), Prompt.of(PREFIX, changed, QUESTION))
        after = seen.kv[-engine.spec.layers :]
        for pair, other in zip(before, after, strict=True):
            for x, y in zip(pair, other, strict=True):
                close(x[:, :row], y[:, :row])
                assert not torch.allclose(x[:, row], y[:, row])


class _Watched(Prefiller):
    """An engine that records the computed rows and the prompt's KV at every layer of its prefills,
    without rows that are computed late."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name, self.spec, self.fingerprint = engine.name, engine.spec, engine.fingerprint
        self.exposes_attention, self.upload = engine.exposes_attention, engine.upload
        self.rows: list[list[int]] = []
        self.kv: list[KVPair] = []  # keys before RoPE and values, each (kv_heads, rows, head_dim)

    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        return self.engine.encode(chunks, context=context)

    def prefill(
        self, tokens: Tokens, callbacks: PrefillCallbacks | None = None, **options: Any
    ) -> Prefilled:
        if callbacks is not None and not isinstance(callbacks, ComputeRows):  # a second pass
            callbacks = _Noting(callbacks, self, len(tokens))
        return self.engine.prefill(tokens, callbacks, **options)

    def probe(
        self, tokens: Tokens, callbacks: PrefillCallbacks, attend: AttentionRule, **options: Any
    ) -> Any:
        return self.engine.probe(tokens, callbacks, attend, **options)


class _Noting(PrefillCallbacks):
    def __init__(self, callbacks: PrefillCallbacks, seen: _Watched, rows: int) -> None:
        self.callbacks, self.seen, self.count = callbacks, seen, rows

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = kv
        rows = self.callbacks.before(layer, kv)
        self.seen.rows.append(rows.tolist())
        return rows

    def narrows(self, layer: int) -> bool:
        return self.callbacks.narrows(layer)

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.callbacks.after(layer, keys, values)
        self.seen.kv.append(self.view.take(0, self.count))

    def narrowed(self, layer: int) -> Tensor:
        return self.callbacks.narrowed(layer)


@dataclass(frozen=True)
class _Replayed(Blender):
    """Computes given rows at every layer."""

    chosen: tuple[Tensor, ...]
    loads: ReusedKV
    name: ClassVar[str] = "replayed"

    @property
    def reuses(self) -> ReusedKV:
        return self.loads

    def selector(self, layout: Layout, layers: int) -> Selector:
        return _ReplayedRows(self.chosen)


@dataclass
class _ReplayedRows(Selector):
    chosen: tuple[Tensor, ...]

    def first(self) -> Tensor:
        return self.chosen[0]

    def narrows(self, layer: int) -> bool:
        return layer + 1 < len(self.chosen)

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        return self.chosen[layer + 1]
