"""Damaged records, in a short run of ``bench.reliability``."""

from __future__ import annotations

from bench.reliability import fuzz


def test_damaged_records_are_refused() -> None:
    outcome = fuzz.run(fuzz.SHORT, 1)
    assert not outcome.violations, "\n".join(outcome.grouped_violations())
