"""Random programs against a store and a dict, in a short run."""

from __future__ import annotations

import pytest


def test_whatever_is_served_is_what_was_put_last() -> None:
    pytest.importorskip("hypothesis")
    from bench.reliability import machine

    outcome = machine.run(machine.SHORT, 1)
    assert not outcome.violations, "\n".join(outcome.grouped_violations())
