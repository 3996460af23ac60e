"""Fusion in vLLM equals fusion by the embedded engine: tokens, log probabilities, rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from ragcache.blend import Blender
from ragcache.blend.fused import Fused
from ragcache.blend.reuse import Reuse
from ragcache.core.prefill import PrefillContext, prefill
from ragcache.core.report import make_report
from ragcache.core.request import PromptRequest
from ragcache.types import Part, Prompt
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies, new_ticket
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt
from tests.blend.matrix import AT_ONE, PARTIAL, label
from tests.vllm import scene
from tests.vllm.scene import Request, Scene

pytestmark = pytest.mark.vllm

USABLE = [made for made in PARTIAL if made.placement == "consecutive"]


@pytest.fixture(scope="module", autouse=True)
def _variants(tiny: Scene) -> None:
    tiny.keep_variants()


@pytest.mark.parametrize("made", USABLE, ids=label)
def test_every_selector_equals_the_embedded_engine(tiny: Scene, llm: Any, made: Blender) -> None:
    [said] = tiny.ask(llm, [Request.fused(tiny.prompt, made, tiny)])
    tiny.check(said, tiny.prompt, made)


@pytest.mark.parametrize("made", AT_ONE, ids=label)
def test_ratio_one_equals_plain_vllm(tiny: Scene, llm: Any, made: Blender) -> None:
    plain, said = tiny.ask(llm, [Request(tiny.prompt), Request.fused(tiny.prompt, made, tiny)])
    assert (said.refused, said.tokens) == (None, plain.tokens)
    for mine, theirs in zip(said.logprobs, plain.logprobs, strict=True):
        errors = [abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()]
        assert max(errors) <= scene.EXACT


def general(given: Scene, *, first: str) -> Prompt:
    """Stored chunks with texts between them, after the text ``first``; the last chunk is the
    beginning of a stored one."""
    engine = given.engine
    chunks = [engine.template.chunk(text) for text in scene.TEXTS[:3]]
    half = chunks[2][: len(chunks[2]) // 2]
    *_, question = engine.template.prompt(scene.TEXTS[:1], scene.QUESTION).parts
    parts = (
        Part(engine.tokenize(first)),
        Part(chunks[0], True),
        Part(engine.tokenize("Somebody asked about a mill.\n\n")),
        Part(chunks[1], True),
        Part(half, True, chunks[2]),
        Part(engine.tokenize("And boats.\n\n")),
        question,
    )
    return Prompt(parts)


@pytest.mark.parametrize("first", ["", "Be brief.\n\n"], ids=["chunk first", "text first"])
@pytest.mark.parametrize("made", [Reuse(), Fused(0.3), PARTIAL[2]], ids=label)
def test_texts_between_chunks(tiny: Scene, llm: Any, made: Blender, first: str) -> None:
    prompt = general(tiny, first=first)
    for _ in range(2):  # the second time, blocks of the first are cached
        [said] = tiny.ask(llm, [Request.fused(prompt, made, tiny)])
        tiny.check(said, prompt, made)
        if said.report is not None:
            assert [chunk["miss"] for chunk in said.report["chunks"]] == [None] * 3
    plain, exact = tiny.ask(llm, [Request(prompt), Request.fused(prompt, Fused(1.0), tiny)])
    assert (exact.refused, exact.tokens) == (None, plain.tokens)


@pytest.mark.parametrize("made", [Reuse(), Fused(0.3), PARTIAL[2]], ids=label)
def test_chunks_that_are_not_stored_are_computed(tiny: Scene, llm: Any, made: Blender) -> None:
    texts = (scene.TEXTS[0], "Nobody has ever seen this chunk before.", scene.TEXTS[2])
    prompt = tiny.engine.template.prompt(texts, scene.QUESTION)
    [said] = tiny.ask(llm, [Request.fused(prompt, made, tiny)])
    tiny.check(said, prompt, made)
    assert said.report is not None
    assert [chunk["miss"] for chunk in said.report["chunks"]] == [None, "absent", None]


def test_the_report_says_what_the_embedded_engine_s_does(tiny: Scene, llm: Any) -> None:
    made = PARTIAL[2]
    [said] = tiny.ask(llm, [Request.fused(tiny.prompt, made, tiny)])
    context = PrefillContext(tiny.engine, tiny.held, tiny.encoding)
    want = asdict(make_report(prefill(context, PromptRequest(tiny.prompt, made))))
    assert said.report is not None
    for name in ("mode", "recomputed_tokens", "charged_budget", "probe_rows", "bytes_loaded"):
        assert said.report[name] == want[name]
    assert tuple(said.report["computed"]) == want["computed"]


def test_vllm_computes_the_kv_that_is_stored(tiny: Scene, llm: Any) -> None:
    key = tiny.keys[1]
    made = Manifest.keep(key.tokens, key.context, key.fingerprint.digest, new_ticket())
    whole = Prompt.of(key.context, (key.tokens,), ())
    [said] = tiny.ask(llm, [Request(whole, made, salt=cache_salt(made))])
    assert said.refused is None
    keys, values = WorkerReplies(tiny.path / REPLIES_FOLDER).take_kv(made.ticket)
    [want] = tiny.engine.encode([key.tokens], context=key.context)
    for layer in range(tiny.engine.spec.layers):
        torch.testing.assert_close(keys[layer], want.keys[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[layer], want.values[layer], rtol=1e-4, atol=1e-4)
