"""Estimates of a link, from a simulated clock."""

from __future__ import annotations

import math

import pytest

from ragcache.store.remote import bandwidth
from ragcache.store.remote.bandwidth import MAX_REQUESTS, BandwidthMeter, LinkEstimate


class Clock:
    """Stands still but for :meth:`pass_`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bandwidth, "time", made)
    return made


def one(meter: BandwidthMeter, clock: Clock, seconds: float, size: int) -> None:
    with meter.reading(size):
        clock.pass_(seconds)


def known(meter: BandwidthMeter) -> LinkEstimate:
    found = meter.link
    assert found is not None
    return found


def test_nothing_read_nothing_known(clock: Clock) -> None:
    meter = BandwidthMeter()
    with meter.answered():
        clock.pass_(0.02)
    assert meter.link is None


def test_latency_is_no_transfer(clock: Clock) -> None:
    meter = BandwidthMeter()
    with meter.answered():
        clock.pass_(0.02)
    one(meter, clock, 0.12, 1_000_000)
    found = known(meter)
    assert (found.latency_s, found.byte_s) == pytest.approx((0.02, 1e-7))


def test_requests_side_by_side_share_the_link(clock: Clock) -> None:
    meter = BandwidthMeter()
    with meter.reading(500_000):
        clock.pass_(0.05)
        with meter.reading(500_000):
            clock.pass_(0.05)
    clock.pass_(100.0)  # nobody wants anything
    assert known(meter).byte_s == pytest.approx(1e-7)


def test_a_link_that_changes_is_followed(clock: Clock) -> None:
    meter = BandwidthMeter()
    one(meter, clock, 0.1, 1_000_000)
    for _ in range(12):
        one(meter, clock, 1.0, 1_000_000)
    assert known(meter).byte_s == pytest.approx(1e-6)
    one(meter, clock, 0.001, 10)  # of next to no weight
    assert known(meter).byte_s == pytest.approx(1e-6, rel=0.01)
    one(meter, clock, 0.1, 1_000_000)
    assert known(meter).byte_s == pytest.approx(1e-7)


def test_what_this_machine_is_late_with_is_not_the_links(clock: Clock) -> None:
    meter = BandwidthMeter()
    for took in (0.1, 0.5, 0.2, 0.1, 0.9):
        one(meter, clock, took, 1_000_000)
    assert known(meter).byte_s == pytest.approx(1.25e-7)
    for took in (0.01, 0.3, 0.02):  # behind others' bytes
        with meter.answered():
            clock.pass_(took)
    assert known(meter).latency_s == pytest.approx(0.01 * 1.25**2)


def test_where_all_is_latency_nothing_is_taken_for_speed(clock: Clock) -> None:
    meter = BandwidthMeter()
    with meter.answered():
        clock.pass_(0.02)
    one(meter, clock, 0.021, 1_000_000)
    assert known(meter).byte_s == pytest.approx(2.1e-8)


def test_what_fails_brings_nothing_and_takes_its_time(clock: Clock) -> None:
    meter = BandwidthMeter()
    with pytest.raises(OSError), meter.reading(1_000_000):
        clock.pass_(1.0)
        raise OSError
    assert meter.link is None
    with meter.reading(1_000_000):
        with pytest.raises(OSError), meter.reading(1_000_000):
            clock.pass_(0.3)
            raise OSError
        clock.pass_(0.1)
    assert known(meter).byte_s == pytest.approx(4e-7)


def test_seconds() -> None:
    assert LinkEstimate(0.02, 1e-7).seconds(0, 0) == 0
    assert LinkEstimate(0.02, 1e-7).seconds(1, 1_000_000) == pytest.approx(0.12)
    assert LinkEstimate(0.02, 0).seconds(4 * MAX_REQUESTS, 1_000_000) == pytest.approx(
        0.1
    )  # by latency
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError):
            LinkEstimate(wrong, 0)
