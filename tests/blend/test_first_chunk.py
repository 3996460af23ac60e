"""The first chunk of a prompt: exact behind its own encoding context, like any other elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ragcache.blend import blender
from ragcache.core.precompute import precompute
from ragcache.core.prefill import PrefillContext, prefill
from ragcache.core.request import PromptRequest, Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import EncodingContext
from ragcache.planning.lookup import look_up
from ragcache.store.memory import MemoryStore
from ragcache.types import Part, Prompt, Sampling, Tokens
from tests import models
from tests import scene as small
from tests.blend.scene import CHUNKS, PREFIX, QUESTION, plain

ENCODING = EncodingContext("prefix", PREFIX)
OTHER = {
    "nothing": (),
    "other text": (1, 5, 8),
    "more text": (*PREFIX, 8),
    "less text": PREFIX[:2],
    "another user's message": tuple(range(300, 330)),
}


@pytest.fixture(scope="module")
def context() -> PrefillContext:
    engine, store = models.engine("llama"), MemoryStore()
    precompute(engine, store, [ENCODING.key(engine.fingerprint, chunk) for chunk in CHUNKS])
    return PrefillContext(engine, store, ENCODING)


def behind(*texts: Tokens) -> Prompt:
    chunks = (Part(chunk, True) for chunk in CHUNKS)
    return Prompt((*map(Part, texts), *chunks, Part(QUESTION)))


def chosen(context: PrefillContext, prompt: Prompt, mode: str) -> list[set[int]]:
    """The recomputed rows of each chunk, counted from its start."""
    done = prefill(context, PromptRequest(prompt, blender(mode))).fused
    rows = done.chosen[0].tolist()
    return [{row - a for row in rows if a <= row < b} for a, b in prompt.spans]


@pytest.mark.parametrize("texts", [(PREFIX,), (PREFIX[:1], PREFIX[1:])], ids=["one", "two"])
def test_behind_its_encoding_context_it_is_exact(
    context: PrefillContext, texts: Sequence[Tokens]
) -> None:
    prompt, engine = behind(*texts), context.engine
    found = look_up(prompt, blender("epic"), context.store, engine.fingerprint, encoding=ENCODING)
    assert found.layout.exact == (True, False, False)
    assert chosen(context, prompt, "epic:first_tokens=3") == [set(), {0, 1, 2}, {0, 1, 2}]
    assert chosen(context, prompt, "fused")[0] == set()


@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER)
def test_behind_other_text_it_is_like_every_chunk(context: PrefillContext, text: Tokens) -> None:
    prompt = behind(text)
    assert chosen(context, prompt, "epic:first_tokens=3") == [{0, 1, 2}] * 3
    assert all(chosen(context, prompt, "fused:recompute_ratio=0.9"))


@pytest.mark.parametrize("text", [PREFIX, *OTHER.values()], ids=["its own", *OTHER])
def test_epic_with_all_tokens_is_full_prefill(context: PrefillContext, text: Tokens) -> None:
    prompt = behind(text)
    done = prefill(context, PromptRequest(prompt, blender("epic:first_tokens=64")))
    assert isinstance(context.engine, TransformersEngine)
    want = plain(context.engine, prompt.tokens)
    torch.testing.assert_close(done.fused.prefilled.logits, want, atol=1e-4, rtol=1e-4)


def test_a_variant_behind_another_message_is_not_exact(tmp_path: Path) -> None:
    """Cache-Craft computes it again; behind the same message, it costs nothing."""
    with small.small(tmp_path, chat_bytes=0) as cache:

        def ask(mode: str, system: str) -> tuple[torch.Tensor, float]:
            chat = [{"role": "system", "content": system}, {"role": "user", "content": "Who?"}]
            stream = cache.generate(
                Request(
                    messages=chat,
                    chunks=[small.DOCUMENTS[0].text],
                    mode=mode,
                    sampling=Sampling(max_tokens=1),
                )
            )
            report = stream.answer.report
            stream.keep()
            return stream.first_logits, report.charged_share

        mode = "cachecraft:alpha=2.0"
        for system, shares in (("Be brief.", (1, 0)), ("Name the town, then the river.", (1, 0))):
            want, _ = ask("full", system)
            for share in shares:
                logits, charged = ask(mode, system)
                assert charged == share
                torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
