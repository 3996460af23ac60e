"""A service withdraws a promise that its answers do not keep."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ragcache.api.promise_watch import PromiseWatch, compared_tokens, is_promised
from ragcache.api.quality_monitor import QualityMonitor
from ragcache.api.service import Service
from ragcache.core.calibration import Calibration, recorded_calibration
from ragcache.errors import StoreError
from ragcache.settings import Settings
from ragcache.types import Certificate, Sampling
from tests import scene
from tests.api.scene import asked, given, small
from tests.scene import calibration

QUESTION = "Where does Mira Holt live?"
TEXTS = given(*(document.text for document in scene.DOCUMENTS))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Answers of a random model by ``reuse`` hardly ever agree with full prefill's."""
    monitor = QualityMonitor(Settings.load(mode="reuse"), share=1.0)
    with small(tmp_path, monitor, mode="reuse") as service:
        service.precompute("", TEXTS).result(20)
        yield service


def promised(service: Service, **changes: Any) -> Calibration:
    """Record the calibration of mode reuse in the service's store."""
    made = calibration(service.default_cache, mode="reuse", ratio=None, **changes)
    made.record(service.default_cache.catalog)
    return made


def certificate(service: Service, number: int = 0, **options: Any) -> Certificate:
    """That of an answer. A request that names its mode is not counted for the level."""
    given = {"chunks": TEXTS, "mode": "reuse"} | options
    found = asked(service, f"{QUESTION} {number}", **given).report.certificate
    assert found is not None
    return found


def status(service: Service) -> tuple[int, int, int]:
    assert service.quality_monitor is not None
    found = service.quality_monitor.status()
    names = "promised_compared", "promised_disagreed", "promises_withdrawn"
    compared, disagreed, withdrawn = (found[name] for name in names)
    return compared, disagreed, withdrawn


def test_a_promise_that_is_not_kept_is_withdrawn(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    made = promised(service)
    with caplog.at_level(logging.WARNING):
        covered = [certificate(service, number).covered for number in range(12)]
    compared, disagreed, withdrawn = status(service)
    assert withdrawn == 1 and compared < 12 and disagreed > compared / 2
    assert covered == [True] * compared + [False] * (12 - compared)
    found = recorded_calibration(service.default_cache.catalog)
    assert found is not None and found == replace(made, refuted=found.refuted)
    assert found.refuted.startswith(f"of {compared} answers that the service compared with full ")
    assert f", {disagreed} disagree, too many for the promised share of 0.05" in found.refuted
    assert certificate(service).reason == found.refuted
    assert [found.refuted in message for message in caplog.messages] == [True]
    assert service.quality_monitor is not None and service.quality_monitor.level.name == "as set"


def test_calibrating_again_begins_a_new_watch(service: Service) -> None:
    promised(service)
    while certificate(service).covered:
        pass
    promised(service)  # the same
    assert certificate(service).covered
    assert status(service)[2] == 1
    assert certificate(service, mode="full").covered


def test_a_withdrawal_that_cannot_be_recorded_is_tried_again(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    promised(service)
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "record", _full_disk)
        for number in range(8):
            assert certificate(service, number).covered
        assert status(service)[2] == 0
    assert any("cannot be withdrawn: the disk is full" in each for each in caplog.messages)
    certificate(service)
    assert status(service)[2] == 1 and not certificate(service).covered


def test_what_keeps_its_promise_stays(service: Service) -> None:
    """At most nine of ten answers may disagree: no service can find fault with that here."""
    promised(service, epsilon=0.99)
    assert all(certificate(service, number).covered for number in range(12))
    assert status(service)[0] == 12 and status(service)[2] == 0


def test_escalated_answers_agree(service: Service) -> None:
    promised(service, least_margin=1e9)
    assert all(certificate(service, number).escalated for number in range(12))
    assert status(service) == (12, 0, 0)


def test_what_is_not_covered_is_not_compared(service: Service) -> None:
    promised(service)
    certificate(service, sampling=Sampling(7))  # longer than what was calibrated
    certificate(service, mode="full")
    assert not is_promised(asked(service, QUESTION, chunks=given("New."), mode="reuse").report)
    assert status(service) == (0, 0, 0)


def test_tokens_are_compared_where_the_promise_is_about_them(service: Service) -> None:
    made = promised(service, disagreement="tokens", max_tokens=16)
    for tokens, compared in ((6, 6), (16, 16), (40, 16)):
        own = made.certificate(made.blender, Sampling(tokens), 1)
        assert own.covered and compared_tokens(own, Sampling(tokens)) == compared
    assert compared_tokens(replace(own, disagreement="answer"), Sampling(40)) == 40
    cache, watch = service.default_cache, PromiseWatch()
    answer = asked(service, QUESTION, chunks=TEXTS, mode="reuse")
    more = replace(answer, tokens=(*range(16), 99))
    watch.compare(cache, own, more, replace(answer, text="?", tokens=(*range(16), 98)))
    watch.compare(cache, own, more, replace(answer, tokens=(*range(15), 99)))
    watch.compare(cache, replace(own, date="2020-01-01"), more, answer)  # another one's
    assert watch.status()["promised_compared"] == 2
    assert watch.status()["promised_disagreed"] == 1


def test_texts_are_compared_as_they_were_calibrated(service: Service) -> None:
    """Case, punctuation and articles do not count."""
    made = promised(service)
    own, watch = made.certificate(made.blender, Sampling(6), 1), PromiseWatch()
    answer = asked(service, QUESTION, chunks=TEXTS, mode="reuse")
    one = replace(answer, text="The red Harbour.")
    watch.compare(service.default_cache, own, one, replace(answer, text="red harbour"))
    watch.compare(service.default_cache, own, one, replace(answer, text="blue harbour"))
    assert watch.status()["promised_disagreed"] == 1


def test_each_store_has_a_watch_of_its_own(service: Service) -> None:
    """A tenant's bad answers withdraw no promise of another's."""
    cache = service.cache("guest")
    service.precompute("guest", TEXTS).result(20)
    promised(service, epsilon=0.99)
    calibration(cache, mode="reuse", ratio=None).record(cache.catalog)
    for number in range(12):
        certificate(service, number)
        certificate(service, number, tenant="guest")
    assert certificate(service).covered and not certificate(service, tenant="guest").covered
    assert status(service)[2] == 1


def _full_disk(*_: object) -> None:
    raise StoreError("the disk is full")
