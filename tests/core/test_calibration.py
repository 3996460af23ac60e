"""The calibration of a store: the least ratio of auto, and which answers it covers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.blend import blender
from ragcache.cli.render.answers import promise
from ragcache.core.calibration import (
    certified,
    drop_calibration,
    first_token_margin,
    is_uncertain,
    recorded_calibration,
)
from ragcache.errors import StoreError
from ragcache.planning.cost_model import Speeds
from ragcache.rag import RagCache
from ragcache.types import Answer, Certificate, Report, Sampling
from tests import scene
from tests.scene import calibration

QUESTION = "Where does Mira Holt live?"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    """A store that loads at once, so that nothing raises the ratio."""
    with scene.small(tmp_path_factory.mktemp("store"), ratio="auto") as cache:
        cache.add(scene.DOCUMENTS)
        use(cache, 0.0)
        yield cache


def use(cache: RagCache, read_s: float) -> None:
    """Let this be the time to read a layer of a chunk."""
    speeds = Speeds(0.0, 1.0, 0.0, 0.0, read_s, 0.0, 0.0)
    cache.catalog.put_setting(cache.profile.setting, speeds.as_json())
    cache.profile._known = None


def asked(cache: RagCache, **options: Any) -> tuple[float, Certificate]:
    """The ratio that was used, and the certificate."""
    report = cache.ask(QUESTION, **options).report
    assert report.certificate is not None
    return report.parameters.get("recompute_ratio", 1.0), report.certificate


def test_without_a_calibration_nothing_is_promised(cache: RagCache) -> None:
    drop_calibration(cache.catalog)
    answer = cache.ask(QUESTION)
    assert answer.report.certificate is None and not list(promise(answer))
    assert answer.report.parameters["recompute_ratio"] == 0.15


@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_the_calibrated_ratio_is_the_least_of_auto(cache: RagCache, ratio: float) -> None:
    """Also where it is less than the mode's own: that it suffices was tested."""
    calibration(cache, ratio=ratio).record(cache.catalog)
    assert asked(cache)[0] == asked(cache, misses="consistent")[0] == ratio
    assert asked(cache)[1].covered
    assert asked(cache, mode="cacheblend")[0] == 0.15  # another mode keeps its own


def test_a_slow_store_raises_the_calibrated_ratio(cache: RagCache) -> None:
    calibration(cache, mode="fused:attention=0", ratio=0.3).record(cache.catalog)
    use(cache, 2.0)
    try:
        used, certificate = asked(cache, mode="fused:attention=0")
        assert 0.3 < used < 1 and certificate.covered
    finally:
        use(cache, 0.0)


def test_the_certificate_says_what_was_calibrated(cache: RagCache) -> None:
    calibration(cache).record(cache.catalog)
    answer = cache.ask(QUESTION)
    found = answer.report.certificate
    assert found == Certificate(True, "", 0.05, 0.95, "answer", "fused", 0.05, 120, "2026-11-30")
    assert list(promise(answer)) == [
        "- Promised with 95% confidence: in mode fused at a ratio of 0.05 or more, at most 5.0% of "
        "answers disagree with full prefill's (calibrated on 120 questions, 2026-11-30). This "
        "answer is covered."
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 0.04}, "a ratio of 0.05 was calibrated, and this is 0.04"),
        ({"mode": "reuse"}, "mode fused was calibrated, and this is reuse"),
        ({"sampling": Sampling(6, temperature=1.0)}, "greedy answers were calibrated"),
        ({"sampling": Sampling(7)}, "answers of 6 tokens were calibrated, and this may have 7"),
        ({"instructions": "Be brief."}, "questions were calibrated, and this is a chat or has"),
    ],
)
def test_what_was_not_calibrated_is_not_covered(
    cache: RagCache, options: dict[str, Any], why: str
) -> None:
    calibration(cache).record(cache.catalog)
    found = asked(cache, **options)[1]
    assert not found.covered and why in found.reason
    assert "This answer is not covered: " in next(promise(cache.ask(QUESTION, **options)))


def test_a_chat_is_not_covered(cache: RagCache) -> None:
    calibration(cache).record(cache.catalog)
    messages = [{"role": "user", "content": QUESTION}]
    report = cache.ask(messages=messages, template=scene.CHATML).report
    assert report.certificate is not None and not report.certificate.covered


def test_what_computes_more_is_covered(cache: RagCache) -> None:
    calibration(cache).record(cache.catalog)
    for options in ({"ratio": 0.5}, {"mode": "full"}, {"mode": blender("fused", 0.05)}):
        assert asked(cache, **options)[1].covered
    calibration(cache, disagreement="tokens").record(cache.catalog)
    assert not asked(cache, sampling=Sampling(7))[1].covered  # 6 of 16 were compared
    calibration(cache, disagreement="tokens", max_tokens=16).record(cache.catalog)
    assert asked(cache, sampling=Sampling(17))[1].covered
    calibration(cache, mode="epic", ratio=None).record(cache.catalog)
    assert asked(cache, mode="epic")[1].covered and not asked(cache)[1].covered


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codec": "int8"}, "it was calibrated with codec int8, and this is raw"),
        ({"encoding_context": "bos"}, "encoding context bos, and this is prose"),
        ({"model": "m@1", "fingerprint": "1"}, "with the model m@1, and this is "),
        ({"context_digest": "1"}, "other text in the encoding context prose: calibrate again"),
        ({"revision": 1}, "whose mode fused computed other tokens: calibrate again"),
    ],
)
def test_it_does_not_hold_for_what_is_computed_otherwise(
    cache: RagCache, changes: dict[str, Any], why: str
) -> None:
    calibration(cache, **changes).record(cache.catalog)
    used, found = asked(cache)
    assert used == 0.15 and not found.covered and why in found.reason


def test_longer_prompts_are_not_covered(cache: RagCache) -> None:
    texts = [document.text for document in scene.DOCUMENTS]
    calibration(cache, most_chunks=len(texts) - 1).record(cache.catalog)
    longer = cache.ask(QUESTION, chunks=texts, keep=False).report.certificate
    assert longer is not None and not longer.covered
    assert longer.reason == (
        f"prompts of up to {len(texts) - 1} chunks were calibrated, and this has {len(texts)}"
    )
    shorter = cache.ask(QUESTION, chunks=texts[1:], keep=False).report.certificate
    assert shorter is not None and shorter.covered


def test_a_withdrawn_promise_leaves_the_ratio(cache: RagCache) -> None:
    """What it was withdrawn for is no reason to compute less."""
    calibration(cache, ratio=0.3, refuted="9 of 40 disagree").record(cache.catalog)
    used, found = asked(cache)
    assert used == 0.3 and not found.covered and found.reason == "9 of 40 disagree"
    assert asked(cache, mode="full")[1].covered  # it agrees with itself


def test_kv_of_another_codec_is_not_covered(cache: RagCache) -> None:
    certificate = calibration(cache).certificate(blender("fused"), Sampling(6), 3)
    plan = cache.ask(QUESTION).report.plan
    assert plan is not None
    assert certified(certificate, plan, None, is_full=False) == certificate
    lossy = replace(plan, levels={0: 1, 2: 1})
    found = certified(certificate, lossy, None, is_full=False)
    assert found is not None and not found.covered and found.reason.startswith("2 chunks were")


def test_a_record_that_cannot_be_read_says_what_to_do(cache: RagCache) -> None:
    made = calibration(cache)
    made.record(cache.catalog)
    assert recorded_calibration(cache.catalog) == made
    replace(made, mode="fuzed").record(cache.catalog)
    with pytest.raises(StoreError, match="mode 'fuzed' is unknown.*Calibrate again"):
        cache.ask(QUESTION)
    cache.catalog.put_setting("calibration", "{}")
    with pytest.raises(StoreError, match="cannot be read"):
        cache.ask(QUESTION)
    assert drop_calibration(cache.catalog) and not drop_calibration(cache.catalog)


def test_the_margin_is_the_logarithm_of_a_ratio_of_probabilities() -> None:
    logits = torch.tensor([1.0, 4.0, -2.0, 3.5])
    first, second = logits.softmax(0).topk(2).values.tolist()
    assert first_token_margin(logits) == pytest.approx(math.log(first / second)) == 0.5
    assert is_uncertain(0.49, 0.5) and not is_uncertain(0.5, 0.5) and not is_uncertain(0.0, 0.0)
    assert is_uncertain(first_token_margin(torch.tensor([math.nan, 1.0])), 0.5)
    assert is_uncertain(first_token_margin(torch.tensor([math.nan, 1.0])), 0.5)


def answered(cache: RagCache, **options: Any) -> tuple[Answer, torch.Tensor]:
    """An answer, and the logits of its first token."""
    stream = cache.stream(QUESTION, **options)
    return stream.answer, stream.first_logits


@pytest.mark.parametrize("options", [{}, {"mode": "reuse"}, {"misses": "consistent"}])
def test_an_uncertain_answer_is_that_of_full_prefill(
    cache: RagCache, options: dict[str, Any]
) -> None:
    mode = options.get("mode", "fused")
    made = calibration(cache, mode=mode, ratio=None if mode == "reuse" else 0.05)
    made.record(cache.catalog)
    fused, logits = answered(cache, **options)
    full, full_logits = answered(cache, mode="full")
    margin = first_token_margin(logits)
    assert not torch.equal(logits, full_logits) and fused.report.charged_share < 0.5
    replace(made, least_margin=margin).record(cache.catalog)
    sure, first = answered(cache, **options)
    assert sure.tokens == fused.tokens and torch.equal(first, logits)
    replace(made, least_margin=margin + 0.001).record(cache.catalog)
    escalated, first = answered(cache, **options)
    assert escalated.tokens == full.tokens and torch.equal(first, full_logits)
    kept, given = sure.report.certificate, escalated.report.certificate
    assert kept is not None and kept.covered and not kept.escalated and kept.discarded_s == 0
    assert given is not None and given.covered and given.escalated
    assert kept.margin == given.margin == margin and given.least_margin == margin + 0.001
    assert f"of its first token is {margin:.3g}, and answers below" in next(promise(sure))
    assert "so it was escalated to full prefill after " in next(promise(escalated))


def test_the_report_counts_both_prefills(cache: RagCache) -> None:
    calibration(cache).record(cache.catalog)
    fused, full = cache.ask(QUESTION).report, cache.ask(QUESTION, mode="full").report
    calibration(cache, least_margin=1e9).record(cache.catalog)
    report = cache.ask(QUESTION).report
    assert report.escalated and report.certificate is not None and not fused.escalated
    assert 0 < report.certificate.discarded_s < report.ttft_s
    assert report.charged_share == pytest.approx(fused.charged_share + 1)
    assert [one.charged for one in report.chunks] == [one.charged + 1 for one in fused.chunks]
    assert report.bytes_loaded == fused.bytes_loaded > full.bytes_loaded == 0
    assert report.cached_tokens == full.cached_tokens == 0 and report.computed == full.computed
    assert report.chunk_tokens == report.recomputed_tokens
    assert not any(one.loaded for one in report.parts) and report.mode == "fused"
    assert not cache.ask(QUESTION, mode="full").report.escalated


def test_what_is_not_covered_is_not_escalated(cache: RagCache) -> None:
    calibration(cache, least_margin=1e9).record(cache.catalog)
    for options in ({"ratio": 0.04}, {"sampling": Sampling(6, 1.0)}, {"mode": "cacheblend"}):
        report = cache.ask(QUESTION, **options).report
        assert not report.escalated and report.charged_share < 1


@pytest.mark.parametrize("mode", ["fused", "cachecraft", "prefix"])
def test_an_escalated_answer_stores_what_was_missing(tmp_path: Path, mode: str) -> None:
    """Also the KV that a method takes from the prompt itself."""
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        chunks = [passage.chunk for passage in cache.retrieve(QUESTION)]
        given: dict[str, Any] = {"mode": mode, "chunks": chunks}
        cache.ask(QUESTION, **given | {"chunks": chunks[:1]})
        fixed = blender(mode).ratio
        calibration(cache, mode=mode, ratio=fixed, least_margin=1e9).record(cache.catalog)
        if mode == "fused":
            cache.store.delete(cache.indexing.key(chunks[1]))
        first, second = (cache.ask(QUESTION, **given).report for _ in range(2))
        assert first.escalated and second.escalated
        assert [one.miss is None for one in first.chunks] == [True, False]
        assert first.charged_share == pytest.approx(1 + _own_share(first))
        assert not any(one.miss for one in second.chunks)


def _own_share(report: Report) -> float:
    tokens = sum(one.tokens for one in report.chunks)
    return sum((one.charged - 1) * one.tokens for one in report.chunks) / tokens


def test_a_prompt_that_reused_nothing_is_not_prefilled_twice(cache: RagCache) -> None:
    calibration(cache, least_margin=1e9).record(cache.catalog)
    for chunks in ([], ["A text that is not stored."]):
        report = cache.ask(QUESTION, chunks=chunks, keep=False).report
        assert report.certificate is not None and report.certificate.covered
        assert not report.escalated and report.certificate.margin is None


def test_an_escalated_answer_can_be_stopped(cache: RagCache) -> None:
    calibration(cache, least_margin=1e9).record(cache.catalog)
    stream = cache.stream(QUESTION)
    next(iter(stream))
    stream.close()
    assert torch.equal(stream.first_logits, answered(cache, mode="full")[1])


def test_without_logits_there_is_no_promise_that_needs_them(cache: RagCache) -> None:
    made = calibration(cache, least_margin=2.0).certificate(blender("fused"), Sampling(6), 3)
    assert certified(made, None, None, is_full=True) == made
    found = certified(made, None, None, is_full=False)
    assert found is not None and not found.covered and "its logits are not known" in found.reason


def test_a_record_of_an_earlier_version_is_read(cache: RagCache) -> None:
    made = calibration(cache)
    fields = asdict(made)
    for later in ("least_margin", "context_digest", "revision", "most_chunks", "refuted"):
        fields.pop(later)
    cache.catalog.put_setting("calibration", json.dumps(fields))
    found = recorded_calibration(cache.catalog)
    assert found is not None and found.least_margin == 0 and found.ratio == made.ratio
    assert "calibrate again" in asked(cache)[1].reason  # of another version
