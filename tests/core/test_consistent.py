"""What is missing under ``misses=consistent``: computed alone, stored, fused, and reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ragcache.core.precompute import precompute
from ragcache.core.request import Request
from ragcache.errors import ConfigError
from ragcache.rag import RagCache
from ragcache.types import Answer, Prompt
from tests import scene

QUESTION = "Where does Mira Holt live?"
TEXTS = [document.text for document in scene.DOCUMENTS]
CHAT = [
    {"role": "system", "content": "Be brief, and name the town. " * 10},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A helper."},
    {"role": "user", "content": QUESTION},
]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path, misses="consistent", ratio=0.3) as cache:
        yield cache


def asked(cache: RagCache, request: Request) -> tuple[Answer, torch.Tensor]:
    stream = cache.generate(request)
    return stream.answer, stream.first_logits


@pytest.mark.parametrize("chat", [False, True], ids=["question", "chat"])
def test_the_first_answer_is_that_of_a_filled_store(cache: RagCache, chat: bool) -> None:
    """To the last bit, if the store was filled one chunk per forward."""
    asking = Request(messages=CHAT) if chat else Request(QUESTION)
    asking = Request(asking.question, chunks=TEXTS, messages=asking.messages)
    first, logits = asked(cache, asking)
    again, filled = asked(cache, asking)
    assert torch.equal(logits, filled) and first.tokens == again.tokens
    assert {chunk.miss for chunk in first.report.chunks} == {"absent"}
    assert {chunk.miss for chunk in again.report.chunks} == {None}
    assert first.report.loaded_text_tokens == again.report.loaded_text_tokens > 0
    lead = first.prompt.lead
    assert len(lead) == (2 if chat else 1) and again.report.prefix_tokens == sum(map(len, lead))

    _forget(cache, first.prompt)
    for chunk in first.prompt.chunks:
        precompute(cache.engine, cache.chunks, [cache.indexing.key_of(chunk)], batch_tokens=1)
    other, precomputed = asked(cache, asking)
    assert torch.equal(precomputed, filled) and other.tokens == first.tokens


def test_indexing_packs_chunks_and_changes_the_last_bits_only(cache: RagCache) -> None:
    """KV that was computed with other chunks in a forward differs by rounding, and with it the
    logits."""
    asking = Request(QUESTION, chunks=TEXTS)
    answer, alone = asked(cache, asking)
    _forget(cache, answer.prompt)
    precompute(cache.engine, cache.chunks, map(cache.indexing.key_of, answer.prompt.chunks))
    other, packed = asked(cache, asking)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    assert other.tokens == answer.tokens


def test_an_exact_answer_leaves_chunks_as_consistent_ones_do(cache: RagCache) -> None:
    """Chunks that misses=exact stores later are computed alone too, up to rounding."""
    asking = Request(QUESTION, chunks=TEXTS)
    answer, alone = asked(cache, asking)
    _forget(cache, answer.prompt)
    exact = cache.ask(QUESTION, chunks=TEXTS, misses="exact")
    assert exact.tokens == cache.ask(QUESTION, chunks=TEXTS, mode="full").tokens
    again, stored = asked(cache, asking)
    assert {chunk.miss for chunk in again.report.chunks} == {None}
    torch.testing.assert_close(stored, alone, rtol=0, atol=2e-5)


def test_a_damaged_record_is_computed_alone_and_stored_again(cache: RagCache) -> None:
    asking = Request(QUESTION, chunks=TEXTS)
    answer, want = asked(cache, asking)
    key = cache.indexing.key_of(answer.prompt.chunks[1])
    with cache.store.tables.write() as txn:
        name = key.digest + (2).to_bytes(2, "big")
        raw = bytearray(txn.get("layers", name) or b"")
        raw[17] ^= 1
        txn.put("layers", name, bytes(raw))
    damaged, logits = asked(cache, asking)
    assert torch.equal(logits, want) and damaged.tokens == answer.tokens
    assert [chunk.miss for chunk in damaged.report.chunks] == [None, "corrupt", None]
    assert any("chunk 2 was recomputed" in note for note in damaged.report.fallbacks)
    healed, logits = asked(cache, asking)
    assert torch.equal(logits, want)
    assert {chunk.miss for chunk in healed.report.chunks} == {None}


def test_the_report_names_what_was_computed_alone(cache: RagCache) -> None:
    first, second = TEXTS[:2]
    cache.ask(QUESTION, chunks=[first])
    report = cache.ask(QUESTION, chunks=[first, second]).report
    assert [chunk.miss for chunk in report.chunks] == [None, "absent"]
    assert report.fallbacks == (
        "1 of 2 chunks computed alone before the prompt: absent (these tokens are not stored)",
    )
    computed = report.chunks[1].tokens
    assert report.reused_tokens + report.recomputed_tokens == report.chunk_tokens - computed
    again = cache.ask(QUESTION, chunks=[first, second]).report
    assert again.reused_tokens + again.recomputed_tokens == again.chunk_tokens
    assert again.fallbacks == ()


def test_a_request_may_ask_for_consistency_itself(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        report = cache.ask(QUESTION, chunks=TEXTS, misses="consistent").report
        assert "computed alone before the prompt" in report.fallbacks[0]


@pytest.mark.parametrize("mode", ["prefix", "cachecraft"])
def test_methods_that_reuse_earlier_prompts_are_refused(cache: RagCache, mode: str) -> None:
    with pytest.raises(ConfigError, match=f"misses=consistent cannot be used with mode {mode}"):
        cache.ask(QUESTION, chunks=TEXTS, mode=mode)
    assert cache.ask(QUESTION, chunks=TEXTS, mode=mode, misses="exact").tokens


def test_a_ratio_of_auto_is_the_methods_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speeds differ from one time to the next: nothing is planned by them."""
    with scene.small(tmp_path, misses="consistent", ratio="auto") as cache:
        monkeypatch.setattr(cache.profile, "speeds", lambda _: pytest.fail("speeds are measured"))
        report = cache.ask(QUESTION, chunks=TEXTS).report
        assert report.plan is None and report.parameters["recompute_ratio"] == 0.15


def _forget(cache: RagCache, prompt: Prompt) -> None:
    for chunk in prompt.chunks:
        cache.store.delete(cache.indexing.key_of(chunk))
