"""Answers and their agreement with full prefill, compared with plain decoding and forwards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ragcache.blend import Blender, blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval import ask
from ragcache.eval.ask import ask_questions
from ragcache.eval.dataset import EvalContext, Question
from ragcache.eval.evaluate import evaluate, make_blenders
from ragcache.eval.metrics import answer_agreement, first_line
from ragcache.eval.no_context import NoContext
from ragcache.eval.summary import figures
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import Prompt, Sampling, Tokens
from tests import models

CONTEXT = EvalContext(
    ("Mira Holt plays the cello.", "She was born in Oslo.", "The boats were small and fast."),
    (Question("Where?", ("Oslo",)), Question("What does Mira play?", ("cello",))),
)
MODES = ["none", "full", "prefix", "reuse", "ape", "fused:recompute_ratio=0.3", "cacheblend"]


@pytest.fixture(params=["llama", "gemma3_text"], scope="module")
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return models.engine(request.param)


def stream(
    engine: TransformersEngine, prompt: Prompt, mode: Blender, tokens: int, forced: Tokens
) -> tuple[Tokens, Tensor]:
    """A mode's answer, and the logits that predict the forced tokens."""
    store, encoding = MemoryStore(), encoding_context(DEFAULT_CONTEXT, engine)
    keys = [encoding.key(engine.fingerprint, ids) for ids in prompt.chunks]
    precompute(engine, store, [*keys, ChunkKey(engine.fingerprint, prompt.prefix)])
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    request = PromptRequest(prompt, mode, Sampling(max_tokens=tokens), forced=forced)
    made = generator.stream(request)
    return made.answer.tokens, made.forced_logits


def test_answers_and_agreement_are_those_of_each_mode_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[tuple[str, Tokens], ask._Reply] = {}
    usual = ask._Asking._reply

    def reply(
        self: ask._Asking, prompt: Prompt, mode: Blender, forced: Tokens | None
    ) -> ask._Reply:
        made = replies[mode.mode, prompt.question] = usual(self, prompt, mode, forced)
        return made

    monkeypatch.setattr(ask._Asking, "_reply", reply)
    modes = make_blenders(MODES)
    if engine.sliding_window is not None:
        del modes["ape"]  # its overlapping positions need no window
    asked = ask_questions(engine, MemoryStore(), [CONTEXT], modes, max_tokens=5, length="unknown")
    for question, found in zip(CONTEXT.questions, asked, strict=True):
        prompt = engine.template.prompt(CONTEXT.chunks, question.text)
        alone = engine.template.prompt((), question.text)
        answer, want = stream(engine, prompt, modes["full"], 5, ())
        for label, mode in modes.items():
            given = alone if label == "none" else prompt
            own = replies[mode.mode, prompt.question]
            assert own.answer.tokens == stream(engine, given, mode, 5, answer)[0]
            one_by_one = [
                stream(engine, given, mode, n + 1, answer[: n + 1])[1][-1]
                for n in range(len(answer))
            ]
            assert own.forced is not None
            torch.testing.assert_close(own.forced, torch.stack(one_by_one), atol=1e-4, rtol=1e-4)
            outcome = found.outcomes[label]
            kl, top1 = answer_agreement(want, own.forced)
            assert outcome.answer_kl == pytest.approx(kl, abs=1e-6)
            assert outcome.answer_top1 == top1
        assert found.outcomes["full"].answer_kl == 0
        assert found.outcomes["prefix"].answer_kl == pytest.approx(0, abs=1e-6)
        assert found.outcomes["none"].answer_kl > found.outcomes["prefix"].answer_kl  # type: ignore[operator]
        assert found.outcomes["none"].charged == found.outcomes["none"].recomputed == 0


def test_agreement_is_a_mean_over_tokens() -> None:
    full = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    mode = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    p = torch.tensor([2.0, 0.0], dtype=torch.float64).softmax(-1)
    kl = float((p * (p.log() - p.flip(0).log())).sum())
    assert answer_agreement(full, mode) == pytest.approx((kl / 2, 0.5))
    assert answer_agreement(full, full) == (0, 1)


def test_short_answers_are_their_first_line_and_end_with_it() -> None:
    assert first_line("\n\n  Oslo \nQuestion: What?") == "Oslo"
    assert first_line(" \n ") == ""
    assert not ask._has_first_line("\n\n Oslo")
    assert ask._has_first_line("\n\n Oslo\n")


def test_an_answer_ends_where_the_request_says(engine: TransformersEngine) -> None:
    prompt = engine.template.prompt(CONTEXT.chunks, "Where?")
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    generator = LocalGenerator(engine, MemoryStore(), encoding, store_misses=False)
    sampling = Sampling(max_tokens=8)
    whole = generator.stream(PromptRequest(prompt, blender("full"), sampling)).answer
    texts: list[str] = []

    def until(text: str) -> bool:
        texts.append(text)
        return len(texts) == 3

    cut = generator.stream(PromptRequest(prompt, blender("full"), sampling, until=until)).answer
    assert cut.tokens == whole.tokens[:3] and cut.stopped == "stop"
    assert cut.text == texts[-1] == whole.text[: len(cut.text)]


def test_forced_tokens_are_scored_if_the_first_token_ends_the_answer(
    engine: TransformersEngine,
) -> None:
    prompt = engine.template.prompt(CONTEXT.chunks, "Where?")
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    generator = LocalGenerator(engine, MemoryStore(), encoding, store_misses=False)
    request = PromptRequest(
        prompt, blender("full"), Sampling(max_tokens=5), until=lambda text: True, forced=(5, 6, 7)
    )
    made = generator.stream(request)
    assert len(made.answer.tokens) == 1 and made.answer.stopped == "stop"
    _, want = stream(engine, prompt, blender("full"), 5, (5, 6, 7))
    torch.testing.assert_close(made.forced_logits, want)


def test_the_instruction_stands_before_every_question(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = []
    usual = ask._Asking._reply

    def reply(
        self: ask._Asking, prompt: Prompt, mode: Blender, forced: Tokens | None
    ) -> ask._Reply:
        prompts.append(prompt)
        return usual(self, prompt, mode, forced)

    monkeypatch.setattr(ask._Asking, "_reply", reply)
    modes = make_blenders(["reuse", "none", "full"])
    evaluate(engine, MemoryStore(), [CONTEXT], modes, max_tokens=1, instruction="Be brief.")
    texts = ["".join(engine.pieces(prompt.question)) for prompt in prompts]
    assert len(texts) == 6 and all("Be brief.\n\nQuestion: W" in text for text in texts)
    assert [len(prompt.chunks) for prompt in prompts] == [3, 3, 0, 3, 0, 3]  # full, then rotating


def test_no_context_is_full_prefill_of_the_question(engine: TransformersEngine) -> None:
    assert isinstance(make_blenders(["none"])["none"], NoContext)
    labels: Sequence[str] = ["none", "full"]
    found = figures(evaluate(engine, MemoryStore(), [CONTEXT], make_blenders(labels), max_tokens=2))
    none, full = found
    assert none.method == "none" and none.bytes_loaded == 0
    assert none.speedup is not None and full.gap is not None
    assert full.admitted is False  # a random model answers nothing


def test_logits_that_were_not_asked_for_are_not_there(engine: TransformersEngine) -> None:
    prompt = engine.template.prompt((), "Where?")
    generator = LocalGenerator(engine, MemoryStore(), encoding_context(DEFAULT_CONTEXT, engine))
    made = generator.stream(PromptRequest(prompt, blender("full"), Sampling(max_tokens=1)))
    assert made.answer.tokens
    with pytest.raises(RuntimeError, match="ask for forced tokens"):
        made.forced_logits  # noqa: B018
