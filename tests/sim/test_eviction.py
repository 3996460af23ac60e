"""The simulator against plain lists, and Belady's rule and the bound against every possible run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from ragcache.errors import ConfigError, SourceError
from ragcache.planning.flops import Model
from ragcache.sim.eviction import bound, report, simulate, working_set
from ragcache.sim.trace import Asked, Request, load, scans, topics, zipf
from ragcache.store.eviction import POLICIES
from ragcache.types import KVSpec

MODEL = Model(KVSpec(2, 1, 4, "float16"), parameters=100, heads=3)
TOKEN = 32  # bytes: 2 layers, keys and values, 4 dimensions of 2 bytes


def requests(*lines: str, tokens: int | dict[str, int] = 1) -> list[Request]:
    """``"ab"`` is a request for the chunks a and b."""
    sizes = tokens if isinstance(tokens, dict) else dict.fromkeys("".join(lines), tokens)
    return [tuple(Asked(id, sizes[id]) for id in line) for line in lines]


def best(
    trace: Sequence[Request], capacity: int, worth: Callable[[int], float], stores_all: bool
) -> float:
    """The most worth that any run can serve; ``stores_all``: of those that store every request."""
    tokens = dict(chunk for request in trace for chunk in request)
    reached: dict[frozenset[str], float] = {frozenset(): 0.0}
    for request in trace:
        asked = {id for id, _ in request}
        after: dict[frozenset[str], float] = {}
        for held, so_far in reached.items():
            got = so_far + sum(worth(tokens[id]) for id in asked & held)
            for kept in subsets(held | asked):
                fits = sum(TOKEN * tokens[id] for id in kept) <= capacity
                if fits and (asked <= kept or not stores_all):
                    after[kept] = max(got, after.get(kept, 0))
        reached = after
    return max(reached.values())


def subsets(keys: frozenset[str]) -> Iterator[frozenset[str]]:
    return (frozenset(some) for n in range(len(keys) + 1) for some in combinations(keys, n))


def drawn(random: Random, chunks: str, length: int, per_request: int) -> list[str]:
    return ["".join(random.sample(chunks, random.randint(1, per_request))) for _ in range(length)]


def test_sizes_and_costs() -> None:
    assert MODEL.size(10) == 10 * TOKEN
    # 2 * 100 * 10 of the weights; of attention 4 * 2 layers * 12 wide * 10 * 10 / 2
    assert MODEL.flops(10) == 2000 + 4800


def test_an_outcome_by_hand() -> None:
    trace = requests("ab", "ca", "bd", "e", "c", tokens={"a": 1, "b": 2, "c": 1, "d": 1, "e": 9})
    # Room for 4 tokens: a and b; then c, and a is a hit; b is a hit, and d takes the place of a.
    found = simulate(trace, "lru", 4 * TOKEN, MODEL)
    assert (found.requests, found.chunks, found.tokens) == (5, 8, 18)
    assert (found.hits, found.hit_tokens) == (3, 4), "a, b, and c"
    assert found.saved_flops == 2 * MODEL.flops(1) + MODEL.flops(2)
    assert found.flops == 5 * MODEL.flops(1) + 2 * MODEL.flops(2) + MODEL.flops(9)
    assert (found.evictions, found.refused) == (1, 1), "a goes; e is never stored"
    assert (found.hit_rate, found.token_rate) == (3 / 8, 4 / 18)
    assert found.saved == found.saved_flops / found.flops


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
def test_a_requests_own_chunks_stay(name: str) -> None:
    """Room for two: c has to wait until a and b, which came in with it, are not asked for."""
    trace = requests("abc", "ab", "ab", "c", "c")
    found = simulate(trace, name, 2 * TOKEN, MODEL)
    assert (found.hits, found.refused, found.evictions) == (5, 1, 1)


def test_a_chunk_named_twice_counts_once() -> None:
    found = simulate(requests("aa", "aba"), "lru", 9 * TOKEN, MODEL)
    assert (found.chunks, found.tokens, found.hits) == (3, 3, 1)


@pytest.mark.parametrize("seed", range(3))
def test_lru_against_a_list(seed: int) -> None:
    trace = zipf(200, 40, per_request=4, seed=seed, tokens=(1, 9))
    tokens = dict(chunk for request in trace for chunk in request)
    held: list[str] = []
    hits = evictions = 0
    for request in trace:
        asked = [id for id, _ in request]
        served = [id for id in asked if id in held]
        hits += len(served)
        for id in served:
            held.remove(id)
        held += served
        for id in asked:
            if id not in held:
                while sum(tokens[k] for k in held) + tokens[id] > 60:
                    held.remove(next(k for k in held if k not in asked))
                    evictions += 1
                held.append(id)
    found = simulate(trace, "lru", 60 * TOKEN, MODEL)
    assert (found.hits, found.evictions, found.refused) == (hits, evictions, 0)


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_of_all_runs_where_sizes_are_equal(seed: int) -> None:
    trace = requests(*drawn(Random(seed), "abcdef", 9, 2))
    found = simulate(trace, "belady", 3 * TOKEN, MODEL)
    assert found.hits == best(trace, 3 * TOKEN, lambda tokens: 1, stores_all=True)


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_is_no_less_than_the_best_of_all_runs(seed: int) -> None:
    random = Random(seed)
    sizes = {id: random.randint(1, 6) for id in "abcdef"}
    trace = requests(*drawn(random, "abcdef", 8, 3), tokens=sizes)
    found = bound(trace, 9 * TOKEN, MODEL)
    assert found.hits >= best(trace, 9 * TOKEN, lambda tokens: 1, stores_all=False) - 1e-9
    assert found.hit_tokens >= best(trace, 9 * TOKEN, float, stores_all=False) - 1e-9
    assert found.saved_flops >= best(trace, 9 * TOKEN, MODEL.flops, stores_all=False) - 1e-9


def test_the_bound_by_hand() -> None:
    """Each of a and b needs room over two requests; there is room for three: one, and a half."""
    trace = requests("a", "b", "a", "b")
    found = bound(trace, TOKEN, MODEL)
    assert (found.hits, found.hit_tokens, found.saved_flops) == (1.5, 1.5, 1.5 * MODEL.flops(1))
    assert bound(requests("a", "a", tokens=2), TOKEN, MODEL).hits == 0, "it never fits"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_no_policy_beats_belady_or_the_bound(seed: int, share: float) -> None:
    equal = scans(zipf(150, 100, per_request=4, seed=seed, tokens=(8, 8)), 30, 5, seed)
    capacity = int(share * working_set(equal, MODEL))
    hits = {row.outcome.policy: row.outcome.hits for row in report(equal, MODEL, [capacity])}
    assert max(hits[name] for name in POLICIES) <= hits["belady"] <= hits["bound"]


def test_the_bound_of_a_store_for_everything_is_what_recurs() -> None:
    trace = zipf(100, 30, per_request=4)
    whole = working_set(trace, MODEL)
    for name in (*POLICIES, "belady", "bound"):
        found = simulate(trace, name, 2 * whole, MODEL)
        assert found.hits == found.chunks - len({id for request in trace for id, _ in request})


def test_the_working_set_is_what_recurs() -> None:
    trace = requests("ab", "ac", "bd", tokens={"a": 1, "b": 2, "c": 4, "d": 8})
    assert working_set(trace, MODEL) == 3 * TOKEN


def test_scans_ruin_lru_most() -> None:
    popular = zipf(400, 400)
    mixed = scans(popular, every=50, length=20)
    capacity = working_set(popular, MODEL) // 10
    rows = report(mixed, MODEL, [capacity])
    lru, pgdsf, craft, belady, _ = (row.outcome.saved for row in rows)
    assert lru < pgdsf < belady and lru < craft < belady
    assert [row.of_belady for row in rows[:4]] == [
        pytest.approx(one / belady) for one in (lru, pgdsf, craft, belady)
    ]


def test_a_report_is_by_capacity_and_policy() -> None:
    rows = report(requests("ab", "a"), MODEL, [TOKEN, 5 * TOKEN], ["craft"])
    assert [(row.outcome.capacity // TOKEN, row.outcome.policy) for row in rows] == [
        (capacity, name) for capacity in (1, 5) for name in ("craft", "belady", "bound")
    ]
    (lonely, *_) = report(requests("a", "b"), MODEL, [TOKEN])
    assert math.isnan(lonely.of_belady), "nothing recurs: there is nothing to share"


def test_zipf_draws_by_rank() -> None:
    trace = zipf(4000, 50, exponent=1.0, per_request=1)
    asked = Counter(id for request in trace for id, _ in request)
    total = sum(1 / rank for rank in range(1, 51))
    for rank in (1, 2, 5):
        assert asked[f"chunk{rank - 1}"] == pytest.approx(4000 / rank / total, rel=0.15)
    assert {64 <= tokens <= 512 for request in trace for _, tokens in request} == {True}


def test_generators_repeat_themselves() -> None:
    trace = zipf(50, 30, seed=3)
    assert trace == zipf(50, 30, seed=3) != zipf(50, 30, seed=4)
    assert scans(trace, 10, 2, seed=1) == scans(trace, 10, 2, seed=1) != scans(trace, 10, 2)
    assert all(len({id for id, _ in request}) == 8 for request in trace)


def test_a_scan_asks_for_cold_chunks_once() -> None:
    trace = zipf(25, 30)
    mixed = scans(trace, every=10, length=3)
    assert [request for request in mixed if request[0].id.startswith("chunk")] == trace
    cold = [id for request in mixed for id, _ in request if id.startswith("cold")]
    assert len(mixed) == 25 + 2 * 3 and len(set(cold)) == len(cold) == 6 * 8


def test_a_trace_that_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match="cannot draw 8 of 15 chunks"):
        zipf(1, 15)
    with pytest.raises(ConfigError, match="exponent from 0 to 2"):
        zipf(1, 100, exponent=9)
    with pytest.raises(ConfigError, match="every 0 requests"):
        scans([], 0, 1)


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(ConfigError, match="'mru' is unknown"):
        simulate([], "mru", 1, MODEL)
    with pytest.raises(ConfigError, match="capacity is 0 bytes"):
        report([], MODEL, [0])
    assert simulate([], "lru", 1, MODEL).saved == 0


def test_every_way_to_write_a_trace(tmp_path: Path) -> None:
    lines = [
        {"chunks": [{"id": "a", "tokens": 3, "title": "A"}, ["b", 4]], "at": 1.5},
        [["b", 4], {"id": "a", "tokens": 3}],
        [],
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert load(file) == requests("ab", "ba", "", tokens={"a": 3, "b": 4})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "7",
        "null",
        '"ab"',
        '{"ids": []}',
        '{"chunks": {"a": 3}}',
        '{"chunks": [{"id": "a"}]}',
        '{"chunks": [{"id": 1, "tokens": 3}]}',
        '[["a", 0]]',
        '[["a", -3]]',
        '[["a", 1.5]]',
        '[["a", true]]',
        '[["a", NaN]]',
        '[["a", 3, 4]]',
        '[["a", 99999999999]]',
        '[["a", 4]]',
        "[" * 100_000,
        "[" + "9" * 5000 + "]",
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f'[["a", 3]]\n\n{line}\n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"trace\.jsonl:3: expected") as caught:
        load(file)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="holds no requests"):
        load(tmp_path / "empty")
    for name in ("binary", "absent", "."):
        with pytest.raises(SourceError, match="cannot read the trace"):
            load(tmp_path / name)


def test_a_store_without_room_or_period_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs at least 1"):
        simulate([], "lru", 0, Model(KVSpec(2, 2, 8, "float32"), 1000, 2))
    with pytest.raises(ConfigError, match="let at least 1 request pass"):
        scans([], 0, 1)


def test_a_trace_draws_no_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match="ask for at most as many as a document has"):
        topics(1, documents=1, each=2, per_request=3)
