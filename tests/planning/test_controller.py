"""Load or compute: by hand, against every subset, and properties for any speeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragcache.blend import blender
from ragcache.planning.controller import (
    _MIN_RATIO,
    Alternative,
    PrefillCost,
    _free_ratio,
    _Loaded,
    _preload,
    controls,
    plan,
)
from ragcache.planning.cost_model import Speeds
from ragcache.store.remote.bandwidth import LinkEstimate

MS = 0.001


def machine(read_ms: float, **changes: float) -> Speeds:
    """A row computes in 1 ms; a layer of a chunk is read in ``read_ms``; all else is free."""
    return replace(Speeds(0, MS, 0, 0, read_ms * MS, 0, 0.02), **changes)  # type: ignore[arg-type]


def asked(*chunks: int, question: int = 20, **changes: object) -> PrefillCost:
    """Stored chunks of so many tokens, 10 kB each, in a model of 4 layers; no prefix."""
    demand = PrefillCost(
        0, chunks, question, (), tuple((Alternative(10_000 * n),) for n in chunks), 4
    )
    return replace(demand, **changes)  # type: ignore[arg-type]


def test_where_computing_takes_longer_the_ratio_stays_at_its_floor() -> None:
    made = plan(asked(100, 100), machine(1))
    assert (made.ratio, made.recompute) == (0.15, ())
    assert made.load_s == pytest.approx(8 * MS)  # 2 chunks of 4 layers
    assert made.compute_s == made.prefill_s == pytest.approx(50 * MS)  # 20 + 0.15 * 200 rows
    assert made.token_s == 0.02
    assert made.sentences == (
        "Loading 2.0 MB in 8 reads at 0.25 GB/s takes 8.0 ms; computing 15% of the 200 loaded "
        "rows and all that are not loaded, 50 ms: computing takes longer, so the ratio stays at "
        "its floor, 0.15.",
    )


def test_where_loading_takes_longer_the_ratio_rises_until_it_does_not() -> None:
    made = plan(asked(100), machine(15))
    assert made.recompute == ()  # 120 ms to compute it all, 60 to load it
    assert made.ratio == pytest.approx(0.4)  # 20 + 0.4 * 100 rows
    assert made.compute_s == pytest.approx(made.load_s) == pytest.approx(60 * MS)
    assert "the ratio rises to 0.40, which takes 60 ms." in made.sentences[-1]


def test_with_a_probe_computing_waits_for_loading() -> None:
    """So there is no time in which more could be computed, and less is worth loading."""
    made = plan(asked(100, probed=20.0), machine(7))
    assert (made.ratio, made.recompute, made.overlap) == (0.15, (), False)
    assert made.load_s == pytest.approx(28 * MS)
    assert made.compute_s == pytest.approx(55 * MS)  # 20 + 20 + 0.15 * 100 rows
    assert made.prefill_s == pytest.approx(83 * MS)
    assert "the ratio stays at its floor, 0.15." in made.sentences[-1]
    slow = plan(asked(100, probed=20.0), machine(18))  # 72 + 55 ms, and 120 to compute it all
    assert slow.recompute == (0,) and slow.overlap
    assert slow.prefill_s == slow.compute_s == pytest.approx(120 * MS)


def test_rows_of_the_question_that_are_computed_again_are_counted() -> None:
    made = plan(asked(100, repeated=20), machine(7))
    assert made.ratio == 0.15 and made.overlap
    assert made.compute_s == pytest.approx(55 * MS)  # 20 + 20 + 0.15 * 100 rows
    assert made.prefill_s == pytest.approx(55 * MS)


def test_on_a_slow_disk_everything_is_computed_and_exact() -> None:
    made = plan(asked(100), machine(31))
    assert (made.recompute, made.load_s) == ((0,), 0)
    assert made.compute_s == pytest.approx(120 * MS)
    assert made.sentences == (
        "1 of 1 stored chunks (number 1; 100 tokens) are computed and not loaded: the longer of "
        "loading and computing falls from 124 ms to 120 ms.",
        "No chunk is loaded: this is full prefill, and exact.",
    )


def test_a_short_chunk_is_computed_and_a_long_one_loaded() -> None:
    made = plan(asked(400, 4), machine(25))
    assert made.recompute == (1,)  # 200 ms to load both, 100 the first; 84 to compute the rest
    assert made.compute_s == pytest.approx(made.load_s) == pytest.approx(100 * MS)
    assert made.ratio == pytest.approx(0.19)  # 24 + 0.19 * 400 rows


def test_of_equal_chunks_the_last_are_computed() -> None:
    made = plan(asked(100, 100, 100), machine(50))  # 200 ms to load each, 85 more to compute it
    assert made.recompute == (1, 2)  # and not the first, which stands where it was computed


def test_layers_in_full_are_paid_whatever_the_ratio() -> None:
    made = plan(asked(100, full_layers=2), machine(20))
    assert made.ratio == pytest.approx(0.2)  # 20 + 100 * (2 + 2 * 0.2) / 4 rows: 80 ms
    assert "15% of the 100 loaded rows, all of them in 2 layers, and all" in made.sentences[0]


def test_what_is_missing_or_long_computes_longer() -> None:
    demand = asked(100, 100, alternatives=((Alternative(100),), ()))
    made = plan(demand, machine(1, pair_s=1e-5, place_s=1e-4, start_s=0.005))
    assert made.load_s == pytest.approx(4 * MS)
    # 20 + 100 + 15 rows, each against all 220, 100 rows placed
    assert made.compute_s == pytest.approx(0.005 + 135 * MS + 135 * 220 * 1e-5 + 100 * 1e-4)
    assert made.sentences[0] == "1 of 2 chunks are not stored: computed."


def test_stored_texts_are_always_loaded() -> None:
    demand = asked(10, texts=30, text_records=(Alternative(30),))
    made = plan(demand, machine(100))
    assert made.recompute == (0,)
    assert made.load_s == pytest.approx(400 * MS) and made.compute_s == pytest.approx(30 * MS)


def test_nothing_stored_is_nothing_to_choose() -> None:
    made = plan(asked(10, 10, alternatives=((), ())), machine(1))
    assert (made.ratio, made.recompute, made.load_s) == (0.15, (), 0)
    assert made.sentences[-1] == "Nothing can be loaded, so there is no ratio to choose."


def test_reading_that_stops_computing_leaves_no_time_to_spend() -> None:
    """Without overlap a chunk is loaded where that is faster than to compute it, at the floor."""
    made = plan(asked(100, 100), machine(15, overlap_penalty=1))
    assert (made.ratio, made.recompute) == (0.15, ())
    assert made.compute_s == pytest.approx(170 * MS)
    assert "170 ms (120 ms of it waiting for reads): computing takes longer" in made.sentences[0]
    half = plan(asked(100), machine(15, overlap_penalty=0.5))
    assert half.ratio == _MIN_RATIO  # 35 ms, and 30 standing still
    assert plan(asked(100), machine(15, overlap_penalty=0.25)).ratio == pytest.approx(0.25)
    assert plan(asked(100), machine(22, overlap_penalty=1)).recompute == (
        0,
    )  # 88 ms to load, 85 to compute


def test_a_slower_disk_can_lower_the_ratio_but_not_the_work() -> None:
    """Once a chunk is computed instead, there is less to wait for."""
    plans = [plan(asked(100), machine(read)) for read in (5, 15, 20, 25, 31)]
    assert [round(p.ratio, 2) for p in plans] == [0.15, 0.4, 0.6, 0.8, 0.15]
    times = [p.compute_s for p in plans]
    assert times == sorted(times)


SAME = settings(derandomize=True, deadline=None)  # a run tries what the last one tried
ROWS = st.integers(1, 500)
PRICES = st.floats(0, 1)
MACHINES = st.builds(
    Speeds,
    start_s=PRICES,
    row_s=st.floats(1e-4, 1),
    pair_s=st.floats(0, 1e-3),
    place_s=st.floats(0, 1e-4),
    read_s=st.floats(1e-3, 10),
    byte_s=PRICES,
    token_s=PRICES,
    overlap_penalty=st.floats(0, 1),
)
FLOORS = st.floats(_MIN_RATIO, 1)


@st.composite
def demands(draw: st.DrawFn) -> PrefillCost:
    chunks = tuple(draw(st.lists(ROWS, max_size=8)))
    stored = tuple(draw(st.just(()) | st.builds(lambda n: (Alternative(n),), ROWS)) for _ in chunks)
    prefix = draw(st.none() | ROWS)
    full = draw(st.integers(0, 4))
    texts = () if prefix is None else (Alternative(prefix),)
    return PrefillCost(prefix or 0, chunks, draw(ROWS), texts, stored, 4, draw(FLOORS), full)


def these(demand: PrefillCost, numbers: Iterable[int]) -> _Loaded:
    """So many chunks, from the first form of each."""
    return {i: demand.alternatives[i][0] for i in numbers}


def longest(demand: PrefillCost, speeds: Speeds, loaded: _Loaded) -> float:
    return max(demand.load_s(speeds, loaded), demand.compute_s(speeds, loaded, demand.floor))


def chosen(demand: PrefillCost, speeds: Speeds) -> _Loaded:
    """The chunks that its plan loads."""
    made = plan(demand, speeds)
    assert set(made.recompute) <= set(demand.stored)
    loaded = [i for i in demand.stored if i not in made.recompute]
    return {i: demand.alternatives[i][made.levels.get(i, 0)] for i in loaded}


@SAME
@given(demands(), MACHINES)
def test_near_the_best_of_all_subsets(demand: PrefillCost, speeds: Speeds) -> None:
    stored, time = demand.stored, longest(demand, speeds, chosen(demand, speeds))
    subsets = chain.from_iterable(combinations(stored, n) for n in range(len(stored) + 1))
    best = min(longest(demand, speeds, these(demand, subset)) for subset in subsets)
    every = these(demand, stored)
    slack = 0.0
    for chunk in stored:
        others = these(demand, set(stored) - {chunk})
        saved = demand.load_s(speeds, every) - demand.load_s(speeds, others)
        added = demand.compute_s(speeds, others, demand.floor)
        added -= demand.compute_s(speeds, every, demand.floor)
        slack = max(slack, saved * added / (saved + added) if added > 0 else 0.0)
    assert best <= time * (1 + 1e-9) and time <= (best + slack) * (1 + 1e-9)
    assert time <= min(longest(demand, speeds, every), longest(demand, speeds, {})) * (1 + 1e-9)


@SAME
@given(ROWS, st.integers(1, 8), ROWS, MACHINES)
def test_of_chunks_of_one_size_the_best_number(
    size: int, count: int, question: int, speeds: Speeds
) -> None:
    demand = asked(*[size] * count, question=question)
    best = min(longest(demand, speeds, these(demand, range(n))) for n in range(count + 1))
    assert longest(demand, speeds, chosen(demand, speeds)) == pytest.approx(best)


@SAME
@given(demands(), MACHINES)
def test_the_ratio_keeps_its_floor_and_costs_no_time(demand: PrefillCost, speeds: Speeds) -> None:
    made, loaded = plan(demand, speeds), chosen(demand, speeds)
    assert demand.floor <= made.ratio <= 1
    assert made.prefill_s <= longest(demand, speeds, loaded) * (1 + 1e-9)
    if demand.floor < made.ratio < 1:
        assert made.compute_s == pytest.approx(made.load_s)
    assert made.load_s == demand.load_s(speeds, loaded)
    assert made.sentences and all(s.endswith(".") for s in made.sentences)


@SAME
@given(demands(), MACHINES, st.floats(1, 100))
def test_a_slower_disk_never_lowers_the_ratio_of_what_is_loaded(
    demand: PrefillCost, speeds: Speeds, times: float
) -> None:
    slower = replace(speeds, read_s=times * speeds.read_s, byte_s=times * speeds.byte_s)
    every = these(demand, demand.stored)
    before, after = (_free_ratio(demand, s, every) for s in (speeds, slower))
    assert before <= after + 1e-9


#: Bytes of a chunk as it is, and at two levels: the second is small and slow to decode.
FORMS = (
    Alternative(1_000_000, "", True),
    Alternative(270_000, "int8", True),
    Alternative(110_000, "cachegen", True),
)


def over(mbit: float, latency_s: float = 0.0) -> Speeds:
    """A row computes in 1 ms; decoding runs at 500 MB/s, or at 10; the rest is the link."""
    decode = {"int8": 2e-9, "cachegen": 1e-7}
    return replace(machine(0), decode_s=decode, link=LinkEstimate(latency_s, 8e-6 / mbit))


def far(count: int, tokens: int = 100) -> PrefillCost:
    return asked(*[tokens] * count, alternatives=(FORMS,) * count)


def levels(demand: PrefillCost, speeds: Speeds) -> list[str]:
    """What becomes of every chunk."""
    loaded = chosen(demand, speeds)
    return [loaded[i].codec if i in loaded else "text" for i in range(len(demand.chunks))]


@pytest.mark.parametrize(
    ("mbit", "expected"),
    [
        (10_000, ""),  # 6.4 ms to transfer all, 140 to compute
        (1_000, ""),  # 64 ms
        (150, "int8"),  # 427 ms as it is, 115 at int8; as much as computing leaves time for
        (30, "cachegen"),
        (1, "text"),
    ],
)
def test_what_is_loaded_follows_the_link(mbit: float, expected: str) -> None:
    """Eight chunks: raw while that is no slower, then levels, at last they are computed."""
    found = levels(far(8), over(mbit))
    assert expected in found
    order = ["", "int8", "cachegen", "text"]
    assert {"", "int8", "cachegen", "text"} >= set(found)
    assert max(map(order.index, found)) >= order.index(expected)
    if expected in ("", "text"):
        assert set(found) == {expected}


def test_a_faster_link_never_takes_longer_and_never_loses_more_at_a_time() -> None:
    times = [plan(far(8), over(mbit)).prefill_s for mbit in (1, 3, 10, 30, 100, 300, 1000, 3000)]
    assert times == sorted(times, reverse=True)


@st.composite
def forms(draw: st.DrawFn) -> tuple[Alternative, ...]:
    first = Alternative(draw(st.integers(1, 10**7)), "", draw(st.booleans()))
    sizes = [draw(st.integers(1, first.size)) for _ in range(draw(st.integers(0, 2)))]
    coded = zip(sizes, ("int8", "cachegen"), strict=False)
    return first, *(Alternative(size, codec, draw(st.booleans())) for size, codec in coded)


@SAME
@given(
    st.lists(st.tuples(ROWS, forms()), min_size=1, max_size=5),
    MACHINES,
    st.floats(0, 1e-5),
    st.floats(0, 1),
    st.floats(0, 1e-6),
)
def test_never_longer_than_any_one_thing_for_all(
    chunks: list[tuple[int, tuple[Alternative, ...]]],
    speeds: Speeds,
    byte_s: float,
    latency_s: float,
    decode_s: float,
) -> None:
    """Raw, one level, or to compute: whichever of them is best for all is not beaten."""
    demand = asked(*(n for n, _ in chunks), alternatives=tuple(each for _, each in chunks))
    decode = {"int8": decode_s, "cachegen": 10 * decode_s}
    given = replace(speeds, decode_s=decode, link=LinkEstimate(latency_s, byte_s))
    time = longest(demand, given, chosen(demand, given))
    alike = [these(demand, demand.stored), {}]
    for level in (1, 2):
        alike.append(
            {i: each[min(level, len(each) - 1)] for i, each in enumerate(demand.alternatives)}
        )
    assert time <= min(longest(demand, given, one) for one in alike) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["fused", "cacheblend", "prophet", "random+full_layers=2"])
def test_methods_with_a_ratio_are_controlled(name: str) -> None:
    assert controls(blender(name))


@pytest.mark.parametrize("name", ["full", "prefix", "reuse", "epic", "cachecraft", "ape"])
def test_others_are_not(name: str) -> None:
    assert not controls(blender(name))


@pytest.mark.parametrize(
    ("load", "compute", "layers"), [(1.0, 2.0, 1), (1.0, 1.0, 1), (2.0, 1.0, 9), (1e9, 1.0, 17)]
)
def test_no_layer_is_waited_for_behind_the_first(load: float, compute: float, layers: int) -> None:
    """17 layers: with L_p of them there, the last arrives before it is computed."""
    there = _preload(17, load, compute)
    assert there == layers
    begins = there * load / 17
    assert all(begins + n * compute / 17 >= (n + 1) * load / 17 - 1e-9 for n in range(there, 17))
