"""Faults, flipped bits and damaged records, in short runs of ``bench.reliability``."""

from __future__ import annotations

from bench.reliability import fuzz
from bench.reliability.refuse import possible
from tests.store.disk.test_kills import reliability


def test_faults_are_typed_errors_and_flips_are_noticed_and_nothing_else_happens() -> None:
    told = reliability("faults", "flips")
    assert "layer records: miss: corrupt 10" in told
    if possible():
        assert "ENOSPC: put StoreError" in told  # it did happen


def test_damaged_records_are_refused() -> None:
    outcome = fuzz.run(fuzz.SHORT, 1)
    assert not outcome.violations, "\n".join(outcome.grouped_violations())
