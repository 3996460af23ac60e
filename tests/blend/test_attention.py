"""Methods that use attention, against the model's own attention weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ragcache.blend.ape import APE
from ragcache.blend.base import Blender, FixedRows, Layout, positions
from ragcache.blend.cachecraft import CacheCraft
from ragcache.blend.fuse import fuse
from ragcache.blend.fused import Fused
from ragcache.blend.infoflow import InfoFlow
from ragcache.blend.kvshare import KVShare
from ragcache.blend.prophet import Prophet
from ragcache.blend.qcfuse import QCFuse
from ragcache.blend.reuse import Reuse
from ragcache.engine.base import AttentionCall, LayerView, PrefillCallbacks
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from ragcache.types import Sampling
from tests import models
from tests.blend import scene

REUSABLE = torch.arange(len(scene.PREFIX), scene.PROMPT.question_start)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6, attention="eager")


def stale_attention(engine: TransformersEngine) -> Tensor:
    """The question's weights over the stale KV, (layers, heads, question, keys), from the model
    itself: it continues from the KV that naive reuse has placed."""
    kv = scene.run(engine, Reuse(), room=0).prefilled.kv
    kv.length = kv.start = scene.PROMPT.question_start
    kv.begin(len(scene.QUESTION))
    with torch.inference_mode():
        out = engine.model(
            torch.tensor([scene.QUESTION]), past_key_values=kv, output_attentions=True
        )
    return torch.stack([layer[0] for layer in out.attentions])


def best(scores: Tensor, share: float) -> Tensor:
    return REUSABLE[scores.topk(int(share * len(REUSABLE))).indices].sort().values


def chosen(engine: TransformersEngine, blender: Blender) -> Tensor:
    """The rows of every layer, where they are the same at all."""
    fused = scene.run(engine, blender)
    assert all(torch.equal(rows, fused.chosen[0]) for rows in fused.chosen)
    return fused.chosen[0]


def test_prophet_takes_what_the_question_attends_to(engine: TransformersEngine) -> None:
    weights = stale_attention(engine)[..., REUSABLE].mean((0, 1, 2))
    assert torch.equal(chosen(engine, Prophet(0.3)), best(weights, 0.3))


def test_a_probe_computes_no_missing_chunk(engine: TransformersEngine) -> None:
    """The question alone, at its place in the prompt: the choice is the same as if the missing
    chunk were not part of the prompt but left a gap."""
    fused = scene.run(engine, Prophet(0.3), missing=[1])
    assert fused.probed == 6 * len(scene.QUESTION)
    spans = scene.PROMPT.spans
    gap = torch.arange(*spans[1])
    rows = [row for row in range(len(scene.PROMPT)) if row not in gap]
    kv = scene.run(engine, Reuse()).prefilled.kv
    with torch.inference_mode():
        for layer in range(6):
            keys, values = kv.buffers(layer)
            fewer = torch.tensor([row for row in rows if row < scene.PROMPT.question_start])
            keys[:, :, : len(fewer)] = keys[:, :, fewer].clone()
            values[:, :, : len(fewer)] = values[:, :, fewer].clone()
        kv.length = kv.start = len(fewer)
        kv.begin(len(scene.QUESTION))
        out = engine.model(
            torch.tensor([scene.QUESTION]),
            position_ids=torch.arange(scene.PROMPT.question_start, len(scene.PROMPT))[None],
            past_key_values=kv,
            output_attentions=True,
        )
    weights = torch.stack([layer[0] for layer in out.attentions]).mean((0, 1, 2))
    here = torch.tensor([row for row in rows if row in REUSABLE])
    scores = weights[: len(fewer)][torch.isin(fewer, here)]
    want = here[scores.topk(int(0.3 * len(here))).indices].sort().values
    assert torch.equal(fused.chosen[0], want)


def test_a_probe_sees_the_same_whichever_texts_are_stored(engine: TransformersEngine) -> None:
    whole = scene.run(engine, Prophet(0.3))
    layout = replace(whole.layout, texts_loaded=0)
    chunks = scene.encoded(engine, scene.PROMPT, Prophet())[1:]
    fused = fuse(engine, Prophet(0.3), layout, scene.Held(chunks))
    assert torch.equal(fused.chosen[0], whole.chosen[0])
    assert fused.probed == whole.probed + 6 * len(scene.PREFIX)
    torch.testing.assert_close(fused.prefilled.logits, whole.prefilled.logits)


def test_a_probe_of_a_long_question_computes_its_end(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragcache.blend.base.PROBE_TOKENS", 3)
    fused = scene.run(engine, Prophet(0.3))
    assert fused.probed == 6 * 3
    assert fused.layout.probing.tolist() == list(range(len(scene.PROMPT) - 3, len(scene.PROMPT)))


@pytest.mark.parametrize(
    ("layers", "span"), [("all", (0, 6)), ("first", (0, 2)), ("middle", (2, 4)), ("last", (4, 6))]
)
def test_infoflow_takes_the_norm_over_a_band(
    engine: TransformersEngine, layers: str, span: tuple[int, int]
) -> None:
    weights = stale_attention(engine)[slice(*span), ..., REUSABLE]
    scores = weights.mean(1).square().sum(1).sqrt().sum(0)
    blender = InfoFlow(0.3, layers=layers)  # type: ignore[arg-type]
    assert torch.equal(chosen(engine, blender), best(scores, 0.3))


def test_qcfuse_with_every_row_an_anchor_is_attention_in_the_middle(
    engine: TransformersEngine,
) -> None:
    weights = stale_attention(engine)[1:4, ..., REUSABLE].mean((0, 1, 2))
    blender = QCFuse(0.3, anchors=1.0, critical_layers=3)
    assert torch.equal(chosen(engine, blender), best(weights, 0.3))


def test_qcfuse_shows_the_question_the_anchors_alone(engine: TransformersEngine) -> None:
    """Layer 0: the first rows and those with the smallest keys, by an attention written out."""
    blender = QCFuse(0.3, anchors=0.25, sinks=2, critical_layers=6)
    selector = blender.selector(_layout(), 6)
    assert (probe := selector.probe) is not None
    shown: list[Tensor] = []

    def see(call: AttentionCall) -> Tensor:
        if call.layer == 0:
            norms = call.keys.norm(dim=2).mean(0)
            visible = torch.ones(len(norms), dtype=torch.bool)
            for start, end in scene.PROMPT.spans:
                visible[start + 2 : end] = False
                few = round(0.25 * (end - start))
                visible[start + norms[start:end].topk(few, largest=False).indices] = True
            scores = call.scores().masked_fill(~visible, float("-inf"))
            shown.append(call.attend(scores.softmax(-1)))
        out = probe.see(call)
        assert out is not None
        if call.layer == 0:
            torch.testing.assert_close(out, shown[0])
        return out

    tokens, asking = scene.PROMPT.tokens, _Asking(engine)
    engine.probe(tokens, asking, see, positions=range(len(tokens)), layers=probe.layers)
    assert shown


def test_kvshare_takes_attention_received_times_error(engine: TransformersEngine) -> None:
    full = engine.prefill(scene.PROMPT.tokens).kv.buffers(1)
    stale = scene.run(engine, Reuse()).prefilled.kv.buffers(1)
    error = (full[1] - stale[1]).abs().sum((0, 1, 3))[REUSABLE]
    with torch.inference_mode():
        out = engine.model(torch.tensor([scene.PROMPT.tokens]), output_attentions=True)
    received = out.attentions[1][0].sum((0, 1))[REUSABLE]
    fused = scene.run(engine, KVShare(0.3))
    assert torch.equal(fused.chosen[0], REUSABLE) and torch.equal(fused.chosen[1], REUSABLE)
    assert torch.equal(fused.chosen[2], best(received * error, 0.3))


def test_a_probe_is_charged_with_the_rows_it_computes(engine: TransformersEngine) -> None:
    n, rows = len(REUSABLE), int(0.25 * len(REUSABLE))
    question = len(scene.QUESTION)
    assert scene.run(engine, Prophet(0.25)).charged_budget == pytest.approx((rows + question) / n)
    narrow = scene.run(engine, InfoFlow(0.25, layers="first"))
    assert narrow.charged_budget == pytest.approx((6 * rows + 2 * question) / (6 * n))
    assert scene.run(engine, Prophet(0.0)).charged_budget == 0


def test_a_probe_reads_no_layer_twice(engine: TransformersEngine) -> None:
    """What is loaded is what reuse loads."""
    for blender in (Prophet(0.3), InfoFlow(0.3)):
        layers = scene.run(engine, blender).layers
        assert sum(x.load_bytes for x in layers) == sum(
            x.load_bytes for x in scene.run(engine, Reuse()).layers
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_ape_at_one_is_overlapping_reuse(architecture: str) -> None:
    engine = models.engine(architecture, sliding_window=128)
    same, want = APE(1.0, 1.0), Reuse("overlapping")
    a, b = scene.run(engine, same, room=6), scene.run(engine, want, room=6)
    torch.testing.assert_close(a.prefilled.logits, b.prefilled.logits, atol=1e-4, rtol=1e-4)


def test_ape_equals_the_merge_of_two_attentions(engine: TransformersEngine) -> None:
    """Its formula as the paper has it: two softmaxes, merged by their log-sum-exps, in the
    question's rows and in a generated token's."""
    temperature, scale = 0.7, 0.8
    seen: list[tuple[Tensor, Tensor]] = []
    selector = APE(temperature, scale).selector(_layout(), 6)
    assert selector.attend is not None
    start, stop = int(REUSABLE[0]), int(REUSABLE[-1]) + 1

    def merged(call: AttentionCall) -> Tensor:
        scores = call.scores()
        chunk = scores[..., start:stop]
        other = torch.cat([scores[..., :start], scores[..., stop:]], 2)
        values = call.values.repeat_interleave(2, 0)
        own = torch.cat([values[:, :start], values[:, stop:]], 1)
        o_chunk = (chunk / temperature).softmax(-1) @ values[:, start:stop]
        o_other = other.softmax(-1) @ own
        l_chunk = scale * temperature * (chunk / temperature).logsumexp(-1)
        weight = torch.stack([l_chunk, other.logsumexp(-1)]).softmax(0)[..., None]
        want = weight[0] * o_chunk + weight[1] * o_other
        assert selector.attend is not None and (got := selector.attend(call)) is not None
        seen.append((got, want))
        return want

    prompt = scene.PROMPT
    prefilled = engine.prefill(prompt.tokens, _Asking(engine), attend=merged, room=2)
    list(engine.decode(prefilled, Sampling(max_tokens=2)))
    assert len(seen) >= 6
    for got, want in seen:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_ape_tempers_the_answer_too(engine: TransformersEngine) -> None:
    prefilled = scene.run(engine, APE(0.7, 0.7), room=4).prefilled
    assert prefilled.attend is not None
    tempered = engine.continuation_logits(prefilled, (5, 6))[1]
    untempered = engine.continuation_logits(replace(prefilled, attend=None), (5, 6))[1]
    assert not torch.allclose(tempered, untempered, atol=1e-3)


def test_an_engine_that_hides_its_attention_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "exposes_attention", False)
    for blender in (Prophet(), InfoFlow(), KVShare(), QCFuse(), APE(), CacheCraft(), Fused(0.3)):
        with pytest.raises(ConfigError, match="looks at attention weights, which llama does not"):
            scene.run(engine, blender)


def _layout() -> Layout:
    return Layout(scene.PROMPT, (True,) * 3, 1, positions(scene.PROMPT, "consecutive"))


@dataclass(frozen=True)
class _Rows(Blender):
    rows: FixedRows
    name: ClassVar[str] = "rows"

    def selector(self, layout: Layout, layers: int) -> FixedRows:
        return self.rows


class _Asking(PrefillCallbacks):
    """Places what is stored and computes the question alone."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.parts = scene.encoded(engine, scene.PROMPT, Reuse())

    def before(self, layer: int, kv: LayerView) -> Tensor:
        at = 0
        for part in self.parts:
            kv.place(at, [(part.keys[layer], part.values[layer])])
            at += len(part.tokens)
        return torch.arange(at, len(scene.PROMPT))
