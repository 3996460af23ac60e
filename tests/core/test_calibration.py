"""The calibration of a store: the least ratio of auto, and which answers it covers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ragcache.blend import blender
from ragcache.cli.render.answers import promise
from ragcache.core.calibration import (
    Calibration,
    certified,
    drop_calibration,
    recorded_calibration,
)
from ragcache.core.request import PromptRequest
from ragcache.errors import StoreError
from ragcache.planning.cost_model import Speeds
from ragcache.rag import RagCache
from ragcache.types import Certificate, Prompt, Sampling
from tests import scene

QUESTION = "Where does Mira Holt live?"


def calibration(cache: RagCache, **changes: Any) -> Calibration:
    own = cache.engine.fingerprint
    made = Calibration(
        epsilon=0.05,
        confidence=0.95,
        disagreement="answer",
        max_tokens=6,
        mode="fused",
        ratio=0.05,
        questions=120,
        failures=1,
        model=str(own),
        fingerprint=own.digest.hex(),
        codec=own.codec,
        encoding_context=cache.encoding.mode,
        date="2026-11-30",
    )
    return replace(made, **changes)


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
    calibration(cache, ratio=0.3).record(cache.catalog)
    use(cache, 2.0)
    try:
        used, certificate = asked(cache)
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
    assert asked(cache, sampling=Sampling(7))[1].covered  # 16 of them were compared
    calibration(cache, mode="epic", ratio=None).record(cache.catalog)
    assert asked(cache, mode="epic")[1].covered and not asked(cache)[1].covered


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codec": "int8"}, "it was calibrated with codec int8, and this is raw"),
        ({"encoding_context": "bos"}, "encoding context bos, and this is prose"),
        ({"model": "m@1", "fingerprint": "1"}, "with the model m@1, and this is "),
    ],
)
def test_it_does_not_hold_for_other_kv(cache: RagCache, changes: dict[str, Any], why: str) -> None:
    calibration(cache, **changes).record(cache.catalog)
    used, found = asked(cache)
    assert used == 0.15 and not found.covered and why in found.reason


def test_kv_of_another_codec_is_not_covered(cache: RagCache) -> None:
    certificate = calibration(cache).certificate(blender("fused"), Sampling(6))
    report = cache.ask(QUESTION).report
    assert report.plan is not None
    lossy = replace(report, plan=replace(report.plan, levels={0: 1, 2: 1}))
    request = PromptRequest(Prompt(()), blender("fused"), certificate=certificate)
    assert certified(request, report) == certificate
    found = certified(request, lossy)
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
