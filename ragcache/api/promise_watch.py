"""Watches whether the answers of a service keep what the calibrations of its stores promise.

A calibration promises that answers disagree with full prefill's in at most a share ε of cases, of
questions like those that it was made on. Later questions may be different. So of the answers that
it covers, those that the quality monitor draws are compared with full prefill's as it compared
them, and an escalated answer, which is full prefill's, counts as one that agrees. Each store has a
detector (:mod:`ragcache.eval.change_detector`), since it is looked at after every answer. Its alarm
is recorded in the store's calibration, which from then on covers no answer; the calibrated ratio
stays the least one of ``auto``. Calibrating again replaces it.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

from ragcache.core.calibration import Calibration, recorded_calibration
from ragcache.eval.change_detector import ChangeDetector
from ragcache.eval.metrics import exact_match
from ragcache.types import START_TOKENS

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.types import Answer, Certificate, Report, Sampling

logger = logging.getLogger(__name__)


def is_promised(report: Report) -> bool:
    """Whether something is promised about an answer that was not full prefill's to begin with."""
    covered = report.certificate is not None and report.certificate.covered
    return covered and (report.reused_tokens > 0 or report.escalated)


def compared_tokens(certificate: Certificate, sampling: Sampling) -> int:
    """The number of an answer's tokens that decide whether it agrees."""
    most = sampling.max_tokens
    return min(most, START_TOKENS) if certificate.disagreement == "tokens" else most


class PromiseWatch:
    """The detectors of a service's stores. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[str, tuple[Calibration, ChangeDetector]] = {}  # by tenant
        self._compared = self._disagreed = self._refuted = 0

    def compare(
        self, cache: RagCache, certificate: Certificate, answer: Answer, full: Answer
    ) -> None:
        """Count an answer, after it was computed by full prefill too."""
        if certificate.disagreement == "tokens":
            disagreed = answer.tokens[:START_TOKENS] != full.tokens[:START_TOKENS]
        else:
            disagreed = not exact_match(answer.text, [full.text])
        self.add(cache, certificate, disagreed)

    def add(self, cache: RagCache, certificate: Certificate, disagreed: bool) -> None:
        """Count an answer of a store, and withdraw its promise if too many disagree. Raises
        StoreError."""
        with self._lock:
            calibration = recorded_calibration(cache.catalog)
            if calibration is None or not calibration.issued(certificate):
                return  # it has been replaced or withdrawn since the answer was given
            known, detector = self._watched.get(cache.tenant, (None, None))
            if known != calibration or detector is None:
                detector = ChangeDetector(calibration.epsilon)
                self._watched[cache.tenant] = calibration, detector
            self._compared += 1
            self._disagreed += disagreed
            if not detector.add(disagreed):
                return
            reason = (
                f"of {detector.observations} answers that the service compared with full "
                f"prefill's until {date.today().isoformat()}, {detector.events} disagree, too many "
                f"for the promised share of {calibration.epsilon:g}: calibrate again, on questions "
                "like the latest"
            )
            replace(calibration, refuted=reason).record(cache.catalog)
            del self._watched[cache.tenant]
            self._refuted += 1
            logger.warning("a store's promise is withdrawn: %s", reason)

    def status(self) -> dict[str, int]:
        """Of all stores: the promised answers that were compared, those that disagreed, and the
        promises that were withdrawn."""
        with self._lock:
            return {
                "promised_compared": self._compared,
                "promised_disagreed": self._disagreed,
                "promises_withdrawn": self._refuted,
            }
