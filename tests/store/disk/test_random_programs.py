"""Random programs against a store and a dict, as many as a test suite has time for."""

from __future__ import annotations

import pytest


def test_whatever_is_served_is_what_was_put_last() -> None:
    pytest.importorskip("hypothesis")
    from bench.reliability import machine

    outcome = machine.run(machine.SHORT, 1)
    assert not outcome.violations, "\n".join(outcome.told())
