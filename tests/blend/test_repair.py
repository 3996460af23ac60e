"""Rows that ``fused`` computes late, against the model's own attention and a plain second pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ragcache.blend.base import FixedRows
from ragcache.blend.full_layers import WithFullLayers
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.blend.fused import Fused
from ragcache.blend.reuse import Reuse
from ragcache.engine.base import LayerView, PrefillCallbacks
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.prompt_cache import PlacedKV
from ragcache.types import KVPair, Prompt, Sampling, Tokens
from tests import models
from tests.blend import scene

REUSABLE = torch.arange(len(scene.PREFIX), scene.PROMPT.question_start)
KNOWN = torch.tensor([u for chunk in scene.SENSITIVITIES for u in chunk])
ASKED = len(scene.QUESTION)
LAYERS = 2, 5  # of 6: all but the first third and the last sixth
RATIO, HALF = 0.6, 0.5


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6, attention="eager")


@pytest.fixture(autouse=True)
def any_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a random model are small. An answer repairs two rows a token."""
    monkeypatch.setattr("ragcache.blend.fused._LEAST", 0.0)
    monkeypatch.setattr("ragcache.blend.fused._PER_TOKEN", 2.1 / len(REUSABLE))


def budgets(ratio: float = RATIO, attention: float = HALF) -> tuple[int, int, int]:
    """Rows by sensitivity, for the question, and for the answer."""
    count = int(ratio * len(REUSABLE))
    late = int(attention * count)
    return count - late, late // 2, late - late // 2


def sensitive(count: int) -> Tensor:
    return REUSABLE[KNOWN.topk(count).indices].sort().values


def attention(engine: TransformersEngine, kv: PlacedKV, tokens: Tokens, start: int) -> Tensor:
    """The model's own peak weights of ``tokens``, which stand from row ``start`` on, to the
    reusable rows, mean over the layers; ``kv`` is not changed."""
    copy = kv.continued(1)
    copy.crop(start)
    copy.begin(len(tokens))
    with torch.inference_mode():
        out = engine.model(torch.tensor([tokens]), past_key_values=copy, output_attentions=True)
    weights = torch.stack([layer[0] for layer in out.attentions[slice(*LAYERS)]])
    return weights[..., REUSABLE].amax((1, 2)).mean(0)


def worst(weights: Tensor, done: Sequence[Tensor], count: int) -> Tensor:
    scores = weights * KNOWN.sqrt()
    scores[torch.isin(REUSABLE, torch.cat([*done]))] = -1
    return REUSABLE[scores.topk(count).indices].sort().values


class Over(PrefillCallbacks):
    """Places the KV of a prompt, in one part with keys before RoPE, and computes ``rows``."""

    def __init__(self, stored: Sequence[KVPair], rows: Tensor) -> None:
        self.stored, self.rows = stored, rows

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [self.stored[layer]])
        return self.rows


class Taken(PrefillCallbacks):
    """Takes the KV in place, keys before RoPE, and computes the last row only."""

    def __init__(self, length: int) -> None:
        self.kv: list[KVPair] = []
        self.length = length

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.kv.append(kv.take(0, self.length))
        return torch.tensor([self.length - 1])


def second_pass(
    engine: TransformersEngine, kv: PlacedKV, tokens: Tokens, rows: Tensor
) -> tuple[Tensor, PlacedKV]:
    """Logits and KV after ``rows`` were computed in a new prompt, over a copy of ``kv``."""
    taken = Taken(len(tokens))
    engine.prefill(tokens, taken, placed=kv.continued(8))
    made = engine.prefill(tokens, Over(taken.kv, rows), room=8)
    return made.logits, made.kv


def first_look(engine: TransformersEngine) -> tuple[list[Tensor], Tensor, PlacedKV]:
    """The rows by sensitivity and those for the question, then the logits and the KV."""
    first, asking, _ = budgets()
    done = [sensitive(first)]
    kv = fuse_rows(engine, done[0]).prefilled.kv
    start = scene.PROMPT.question_start
    done.append(worst(attention(engine, kv, scene.QUESTION, start), done, asking))
    rows = torch.cat([done[1], torch.arange(start, len(scene.PROMPT))])
    return done, *second_pass(engine, kv, scene.PROMPT.tokens, rows)


def fuse_rows(engine: TransformersEngine, rows: Tensor) -> FusedPrompt:
    class Rows(Reuse):
        def selector(self, *_: object) -> FixedRows:
            return FixedRows(rows)

    return scene.run(engine, Rows(), room=8)


def test_the_question_repairs_what_it_looks_at(engine: TransformersEngine) -> None:
    done, logits, _ = first_look(engine)
    fused = scene.run(engine, Fused(RATIO, HALF), room=8)
    assert torch.equal(fused.chosen[0], done[0]) and torch.equal(fused.late, done[1])
    torch.testing.assert_close(fused.prefilled.logits, logits, atol=1e-5, rtol=1e-5)


def test_every_token_of_the_answer_repairs_what_it_looks_at(engine: TransformersEngine) -> None:
    done, logits, kv = first_look(engine)
    tokens, left, want = scene.PROMPT.tokens, budgets()[2], list[int]()
    for _ in range(8):
        want.append(int(logits.argmax()))
        tokens = (*tokens, want[-1])
        copy = kv.continued(8)
        copy.begin(1)
        with torch.inference_mode():
            logits = engine.model(torch.tensor([tokens[-1:]]), past_key_values=copy).logits[0, -1]
        kv = copy
        if count := min(2, left):
            left -= count
            done.append(worst(attention(engine, kv, tokens[-1:], len(tokens) - 1), done, count))
            rows = torch.cat([done[-1], torch.tensor([len(tokens) - 1])])
            logits, kv = second_pass(engine, kv, tokens, rows)
    assert not left and len(done) > 3
    fused = scene.run(engine, Fused(RATIO, HALF), room=9)
    steps = engine.decode(fused.prefilled, Sampling(max_tokens=9))
    assert [next(steps).token for _ in range(9)][:8] == want
    assert torch.equal(fused.late, torch.cat(done[1:]).sort().values)


def test_what_is_computed_late_is_charged(engine: TransformersEngine) -> None:
    n, (first, asking, answering) = len(REUSABLE), budgets()
    fused = scene.run(engine, Fused(RATIO, HALF), room=9)
    assert fused.charged_budget == pytest.approx((first + asking + ASKED) / n)
    assert fused.repair_s > 0
    list(engine.decode(fused.prefilled, Sampling(max_tokens=9)))
    looks = -(-answering // 2)
    assert fused.charged_budget == pytest.approx((first + asking + ASKED + answering + looks) / n)


def test_forced_tokens_are_scored_as_if_they_were_decoded(engine: TransformersEngine) -> None:
    """And the answer is decoded as if they had not been scored."""
    prefilled = scene.run(engine, Fused(RATIO, HALF), room=9).prefilled
    answer = tuple(s.token for s in engine.decode(prefilled, Sampling(max_tokens=9)))
    again = scene.run(engine, Fused(RATIO, HALF), room=9).prefilled
    scored = engine.continuation_logits(again, answer)
    assert scored.argmax(1).tolist() == list(answer)
    torch.testing.assert_close(engine.continuation_logits(again, answer), scored)
    assert tuple(s.token for s in engine.decode(again, Sampling(max_tokens=9))) == answer


def test_an_engine_that_decodes_without_repairs_does_all_for_the_question(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, *_ = first_look(engine)
    monkeypatch.setattr(engine, "repairs", False)
    first, asking, answering = budgets()
    fused = scene.run(engine, Fused(RATIO, HALF), room=4)
    assert len(fused.late) == asking + answering and set(done[1].tolist()) <= set(
        fused.late.tolist()
    )
    assert fused.prefilled.repair is None and fused.prefilled.attend is None


def test_without_a_choice_nothing_is_late(engine: TransformersEngine) -> None:
    for blender in (Fused(0.0), Fused(1.0), Fused(0.3, attention=0)):
        fused = scene.run(engine, blender, room=4)
        list(engine.decode(fused.prefilled, Sampling(max_tokens=4)))
        assert not len(fused.late) and not fused.again


def test_a_question_that_costs_more_than_it_may_choose_does_not_look(
    engine: TransformersEngine,
) -> None:
    """What it might have chosen is chosen by sensitivity."""
    few = (4 * ASKED - 1) / len(REUSABLE) + 1e-6
    fused = scene.run(engine, Fused(few, HALF), room=4)
    assert not len(fused.late)
    first, asking, _ = budgets(few)
    assert torch.equal(fused.chosen[0], sensitive(first + asking))


def test_an_engine_without_repairs_does_not_ask_at_that_cost_either(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "repairs", False)
    few = (2 * ASKED - 1) / len(REUSABLE) + 1e-6
    fused = scene.run(engine, Fused(few, HALF), room=4)
    assert not len(fused.late) and not fused.again
    assert torch.equal(fused.chosen[0], sensitive(int(few * len(REUSABLE))))


def test_late_rows_are_counted_once_in_a_layer(engine: TransformersEngine) -> None:
    """The second time in a layer that had computed every row, they are computed again."""
    plain = scene.run(engine, Fused(RATIO, HALF))
    fused = scene.run(engine, WithFullLayers(Fused(RATIO, HALF), 1))
    n, count = len(REUSABLE), sum(budgets()[:2])
    assert [len(rows) for rows in fused.recomputed] == [n] + [count] * 5
    late = budgets()[1]
    assert fused.again == plain.again + late == 6 * ASKED + late
    assert fused.charged_budget == pytest.approx((n + 5 * count + fused.again) / (6 * n))


def test_what_matters_little_is_left(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragcache.blend.fused._LEAST", 1e9)
    fused = scene.run(engine, Fused(RATIO, HALF), room=4)
    list(engine.decode(fused.prefilled, Sampling(max_tokens=4)))
    assert not len(fused.late) and not fused.again and fused.repair_s == 0


def test_the_choice_does_not_depend_on_stored_texts(engine: TransformersEngine) -> None:
    whole = scene.run(engine, Fused(RATIO, HALF))
    layout = replace(whole.layout, texts_loaded=0)
    chunks = scene.encoded(engine, scene.PROMPT, Fused())[1:]
    fused = fuse(engine, Fused(RATIO, HALF), layout, scene.Held(chunks))
    assert torch.equal(fused.late, whole.late)
    torch.testing.assert_close(fused.prefilled.logits, whole.prefilled.logits)


def test_kept_rows_are_seen_and_left(engine: TransformersEngine) -> None:
    """The rows up to the second chunk are kept from a prompt that reused them: the choice among the
    others is as if all had been loaded, and the kept ones could not be chosen."""
    earlier = scene.run(engine, Reuse())
    start = scene.PROMPT.spans[1][0]
    layout = replace(earlier.layout, loaded=(False, True, True), texts_loaded=0, kept=start)
    later = scene.encoded(engine, scene.PROMPT, Fused())[2:]
    fused = fuse(
        engine, Fused(1.0 - 1e-9, 1.0), layout, scene.Held(later), kept=earlier.prefilled, room=4
    )
    weights = attention(engine, earlier.prefilled.kv, scene.QUESTION, scene.PROMPT.question_start)
    asking = (len(REUSABLE) - (start - int(REUSABLE[0])) - 1) // 2
    before = [REUSABLE[REUSABLE < start]]
    assert torch.equal(fused.late, worst(weights, before, asking))


def test_of_a_long_question_the_end_looks(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragcache.blend.base.PROBE_TOKENS", 3)
    fused = scene.run(engine, Fused(RATIO, HALF))
    assert fused.again == 6 * 3
    first = budgets()[0]
    kv = fuse_rows(engine, sensitive(first)).prefilled.kv
    weights = attention(engine, kv, scene.QUESTION[-3:], len(scene.PROMPT) - 3)
    assert torch.equal(fused.late, worst(weights, [sensitive(first)], budgets()[1]))


def test_all_text_after_the_last_chunk_looks(engine: TransformersEngine) -> None:
    """In however many parts, so an engine that computes its last rows again gets the same."""
    *before, question = scene.PROMPT.parts
    whole = scene.run(engine, Fused(RATIO, HALF))
    for at in (1, ASKED - 1):
        ends = (replace(question, tokens=t) for t in (scene.QUESTION[:at], scene.QUESTION[at:]))
        prompt = Prompt((*before, *ends))
        parts = scene.Held(scene.encoded(engine, scene.PROMPT, Fused()))
        cut = fuse(engine, Fused(RATIO, HALF), replace(whole.layout, prompt=prompt), parts)
        assert whole.again == cut.again == 6 * ASKED
        assert torch.equal(whole.late, cut.late)
        torch.testing.assert_close(whole.prefilled.logits, cut.prefilled.logits)


def test_a_prompt_without_chunks_has_nothing_to_repair(engine: TransformersEngine) -> None:
    prompt = Prompt.of(scene.PREFIX, (), scene.QUESTION)
    fused = scene.run(engine, Fused(RATIO, HALF), prompt)
    assert fused.repair is None and fused.charged_budget == 1
