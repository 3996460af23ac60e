"""Tests of the contract of an engine: KV, prefill and decoding, compared with the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ragcache.engine.base import AttentionCall, Draft, Engine, LayerView, PrefillCallbacks
from ragcache.errors import PromptError
from ragcache.types import ChunkKV, Sampling, Tokens

__all__ = ["EngineTests"]

IDS: Tokens = tuple(range(3, 43))  # a prompt, longer than the windows of small models


class FewFromLayer2(PrefillCallbacks):
    """Places ``stored``; computes all rows of :data:`IDS` in layers 0 and 1, then 8 of them.

    ``inside``: layer 1 computes only the KV, and no output, of the rows that are dropped after it.
    """

    rows = torch.tensor([3, 7, 20, 35, 36, 37, 38, 39])

    def __init__(self, stored: ChunkKV, inside: bool) -> None:
        self.stored, self.inside = stored, inside

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        return torch.arange(40) if layer < 2 else self.rows

    def narrows(self, layer: int) -> bool:
        return self.inside and layer == 1

    def narrowed(self, layer: int) -> Tensor:
        return self.rows


class _Placing(PrefillCallbacks):
    """Places ``stored`` before the rows that are computed."""

    def __init__(self, stored: ChunkKV) -> None:
        self.stored = stored

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        return kv.all_rows[len(self.stored.tokens) :]


class _Taking(PrefillCallbacks):
    """Computes every row, and copies the KV of rows ``start:stop`` at every layer."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.taken: list[tuple[Tensor, Tensor]] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = kv
        return torch.arange(len(IDS))

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.taken.append(self.view.take(self.start, self.stop))


def close(got: Tensor, want: Tensor) -> None:
    """Raise AssertionError unless both are equal up to rounding in float32."""
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def assert_same_kv(got: ChunkKV, want: ChunkKV, start: int = 0) -> None:
    """Raise AssertionError unless ``got`` equals the rows of ``want`` from ``start`` on, in every
    layer."""
    for mine, theirs in ((got.keys, want.keys), (got.values, want.values)):
        for a, b in zip(mine, theirs, strict=True):
            close(a, b[:, start:])


class EngineTests:
    """Tests of an :class:`~ragcache.engine.base.Engine` with a model of at least 3 layers.

    The model computes in float32, and its vocabulary includes the ids 3 to 42. A subclass overrides
    :meth:`engine` and :meth:`forward`.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        """The engine to test."""
        raise NotImplementedError("return the engine to test")

    def forward(self, engine: Engine, tokens: Tokens) -> Tensor:
        """Logits, (vocabulary,), after ``tokens``, computed by the model without the engine."""
        raise NotImplementedError("run the model without the engine")

    def test_full_prefill_is_the_models_own_forward(self, engine: Engine) -> None:
        close(engine.prefill(IDS).logits, self.forward(engine, IDS))

    @pytest.mark.parametrize("inside", [False, True])
    def test_stored_kv_and_few_rows_give_the_same_logits(
        self, engine: Engine, inside: bool
    ) -> None:
        callbacks = FewFromLayer2(engine.encode([IDS])[0], inside)
        close(engine.prefill(IDS, callbacks).logits, self.forward(engine, IDS))

    def test_kv_is_as_the_engine_says(self, engine: Engine) -> None:
        kv = engine.encode([IDS])[0]
        assert kv.tokens == IDS and kv.spec == engine.spec
        assert kv.keys[0].shape == (engine.spec.kv_heads, len(IDS), engine.spec.head_dim)

    def test_kv_behind_a_prefix_is_that_of_a_whole_prefill(self, engine: Engine) -> None:
        whole = engine.encode([IDS])[0]
        assert_same_kv(engine.encode([IDS[10:]], context=IDS[:10])[0], whole, 10)

    def test_chunks_are_encoded_together_as_each_by_itself(self, engine: Engine) -> None:
        chunks = [IDS[10:22], IDS[22:23], IDS[23:40]]
        for got, chunk in zip(engine.encode(chunks, context=IDS[:10]), chunks, strict=True):
            assert got.tokens == chunk
            assert_same_kv(got, engine.encode([chunk], context=IDS[:10])[0])

    def test_taken_rows_are_what_was_encoded(self, engine: Engine) -> None:
        callbacks = _Taking(10, 30)
        engine.prefill(IDS, callbacks)
        want = engine.encode([IDS[10:30]], context=IDS[:10])[0]
        keys, values = zip(*callbacks.taken, strict=True)
        assert_same_kv(ChunkKV(IDS[10:30], keys, values), want)

    def test_decoding_goes_on_as_full_prefill_would(self, engine: Engine) -> None:
        steps = list(engine.decode(engine.prefill(IDS, room=6), Sampling(max_tokens=6)))
        tokens = [step.token for step in steps]
        assert 1 <= len(tokens) <= 6
        assert steps[-1].stopped == ("length" if len(tokens) == 6 else "eos")
        assert not any(step.stopped for step in steps[:-1])
        for n, token in enumerate(tokens):
            assert token == int(engine.prefill((*IDS, *tokens[:n])).logits.argmax())

    def test_continuation_logits_are_those_of_one_forward(self, engine: Engine) -> None:
        prefilled = engine.prefill(IDS[:30], room=10)
        logits = engine.continuation_logits(prefilled, IDS[30:])
        for n, row in enumerate(logits):
            close(row, self.forward(engine, IDS[: 30 + n]))
        close(engine.continuation_logits(prefilled, IDS[30:31]), logits[:1])
        with pytest.raises(ValueError, match="at least 1, and 10 rows are reserved"):
            engine.continuation_logits(prefilled, ())
        with pytest.raises(ValueError, match="12 tokens: at least 1"):
            engine.continuation_logits(prefilled, IDS[:12])

    def test_continuation_logits_over_stored_kv_are_those_of_decoding(self, engine: Engine) -> None:
        """The KV of the prompt's first part was computed after other tokens, so no forward of the
        whole prompt has it; and the prompt can be decoded before and after."""
        stored = engine.encode([IDS[:20]], context=IDS[5:9])[0]
        prefilled = engine.prefill(IDS[:30], _Placing(stored), room=6)
        first = [step.token for step in engine.decode(prefilled, Sampling(max_tokens=6))]
        logits = engine.continuation_logits(prefilled, tuple(first))
        assert logits.argmax(-1).tolist() == first
        for n in range(1, len(first)):
            again = engine.prefill(IDS[:30], _Placing(stored), room=6)
            steps = engine.decode(again, Sampling(max_tokens=n + 1))
            assert [step.token for step in steps] == first[: n + 1]
            close(engine.continuation_logits(again, tuple(first[: n + 1])), logits[: n + 1])
        assert [s.token for s in engine.decode(prefilled, Sampling(max_tokens=6))] == first

    def test_a_draft_changes_no_answer(self, engine: Engine) -> None:
        """A right one, one that is right up to its third token, and a wrong one."""
        sampling = Sampling(max_tokens=6)
        prefilled = engine.prefill(IDS, room=6)
        steps = list(engine.decode(prefilled, sampling))
        tokens = tuple(step.token for step in steps)
        for right in range(len(tokens) + 1):
            draft = (*tokens[:right], *(3 + (token == 3) for token in tokens[right:]))
            given = Draft(draft, engine.continuation_logits(prefilled, draft))
            assert list(engine.decode(prefilled, sampling, draft=given)) == steps

    def test_a_seed_repeats_a_sample(self, engine: Engine) -> None:
        def sampled(seed: int) -> list[int]:
            sampling = Sampling(max_tokens=4, temperature=1.5, seed=seed)
            steps = engine.decode(engine.prefill(IDS, room=4), sampling)
            return [step.token for step in steps]

        assert sampled(1) == sampled(1)
        assert len({tuple(sampled(seed)) for seed in range(4)}) > 1

    def test_a_rule_sees_the_attention_and_may_take_its_place(self, engine: Engine) -> None:
        if not engine.exposes_attention:
            pytest.skip("this model's attention cannot be seen")
        layers: list[int] = []

        def rule(call: AttentionCall) -> Tensor:
            layers.append(call.layer)
            weights = call.softmax(call.scores())
            assert weights.shape[1:] == (len(call.rows), call.keys.shape[1])
            assert (weights >= 0).all() and (weights.sum(-1) < 1 + 1e-4).all()
            return call.attend(weights)

        close(engine.prefill(IDS, attend=rule).logits, self.forward(engine, IDS))
        assert layers == list(range(engine.spec.layers))

    def test_a_probe_stops_early(self, engine: Engine) -> None:
        if not engine.exposes_attention:
            pytest.skip("this model's attention cannot be seen")
        seen: list[int] = []
        callbacks = FewFromLayer2(engine.encode([IDS])[0], False)
        places = range(len(IDS))
        engine.probe(
            IDS, callbacks, lambda call: seen.append(call.layer), positions=places, layers=2
        )
        assert seen == [0, 1]

    def test_what_does_not_fit_is_refused(self, engine: Engine) -> None:
        with pytest.raises(PromptError):
            engine.encode([()])
        with pytest.raises(PromptError):
            engine.prefill(())
        with pytest.raises(PromptError):
            engine.prefill(IDS, room=engine.context_tokens)

    def test_pieces_are_the_text(self, engine: Engine) -> None:
        text = "Mira Holt lives in Ålesund: 3 × 4 = 12 😀."
        tokens = engine.tokenize(text)
        pieces = engine.pieces(tokens)
        joined = "".join(pieces)
        assert len(pieces) == len(tokens)
        assert joined in (text, " " + text)  # some tokenizers put a space before any text
