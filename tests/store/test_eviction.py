"""Every policy against a plain list that is sorted for every victim."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from ragcache.errors import ConfigError
from ragcache.store.eviction import POLICIES, Policy, Usage, make_policy


@dataclass
class Line:
    key: int
    size: int
    cost: float
    times: int = 1
    worth: float = 0
    clock: float = 0


RANKS: dict[str, Callable[[Line], float]] = {
    "lru": lambda line: 0,
    "pgdsf": lambda line: line.clock + line.times * line.cost / line.size,
    "craft": lambda line: line.worth,
}


class Listed:
    """The reference: lines from the least recently used on. A stable sort does the rest."""

    def __init__(self, name: str) -> None:
        self.name, self.lines, self.clock = name, list[Line](), 0.0

    def take(self, key: int) -> Line | None:
        found = next((line for line in self.lines if line.key == key), None)
        self.lines = [line for line in self.lines if line.key != key]
        return found

    def add(self, key: int, size: int, cost: float) -> None:
        self.take(key)
        self.lines.append(Line(key, size, cost, clock=self.clock))

    def hit(self, key: int, worth: float) -> None:
        if line := self.take(key):
            line.times, line.worth, line.clock = line.times + 1, line.worth + worth, self.clock
            self.lines.append(line)

    def evict(self, key: int) -> None:
        if (line := self.take(key)) and self.name == "pgdsf":
            self.clock = max(self.clock, RANKS[self.name](line))

    def victims(self, need: int, spared: Container[int]) -> list[int] | None:
        chosen = []
        for line in sorted(self.lines, key=RANKS[self.name]):
            if need > 0 and line.key not in spared:
                chosen.append(line.key)
                need -= line.size
        return None if need > 0 else chosen


def live(random: Random, steps: int, *policies: Any) -> None:
    """The same random life for all; their victims must be the same at every step."""
    for _ in range(steps):
        key, size, number = random.randrange(30), random.randint(1, 9), random.random()
        need, spared = random.randint(0, 40), set(random.sample(range(30), 8))
        first, *others = [p.victims(need, spared) for p in policies]
        assert all(other == first for other in others)
        event = random.randrange(6)
        for p in policies:
            if event < 2:
                for victim in (first or ())[:3]:
                    p.evict(victim)
                p.add(key, size, 5 * number)
            elif event < 5:
                p.hit(key, round(3 * number))  # there or not
            else:
                p.take(key) if isinstance(p, Listed) else p.discard(key)


@pytest.fixture(params=sorted(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def everything(p: Policy[Any]) -> list[Any]:
    return p.victims(p.bytes) or []


@pytest.mark.parametrize("seed", range(3))
def test_victims_are_those_of_the_reference(name: str, seed: int) -> None:
    mine, reference = make_policy(name), Listed(name)
    live(Random(seed), 600, mine, reference)
    assert len(mine) == len(reference.lines)
    assert mine.bytes == sum(line.size for line in reference.lines)


@pytest.mark.parametrize("seed", range(3))
def test_a_restart_changes_nothing(name: str, seed: int) -> None:
    random, one = Random(seed), make_policy(name)
    live(random, 300, one)
    for key in everything(one)[:2]:
        one.evict(key)
    one.add(7, 3, 2.5)  # room was made for it: the clock lives on in it
    kept = [(key, struct.pack("<4d", *one.held(key).use)) for key in everything(one)]
    sizes = {key: (one.held(key).size, one.held(key).cost) for key, _ in kept}
    random.shuffle(kept)
    two = make_policy(name)
    for key, use in kept:
        two.restore(key, *sizes[key], Usage(*struct.unpack("<4d", use)))
    assert everything(two) == everything(one) and two.bytes == one.bytes
    live(random, 300, one, two)
    assert [one.held(k).use for k in everything(one)] == [two.held(k).use for k in everything(two)]


def test_a_store_may_change_its_policy() -> None:
    old, new = make_policy("lru"), make_policy("craft")
    for key in "abc":
        old.add(key, 1, 1)
    old.hit("a", 2)
    for key in "cab":
        new.restore(key, 1, 1, old.held(key).use)
    assert (everything(old), everything(new)) == (["b", "c", "a"], ["b", "c", "a"])
    new.hit("b", 3)
    assert everything(new) == ["c", "a", "b"]


def test_lru() -> None:
    p = make_policy("lru")
    for key in "abc":
        p.add(key, 1, 1)
    p.hit("a")
    assert everything(p) == ["b", "c", "a"]


def test_pgdsf_keeps_what_is_dear_for_its_size_until_it_is_old() -> None:
    p = make_policy("pgdsf")
    p.add("dear", 10, 100)  # 10
    p.add("cheap", 10, 40)  # 4
    p.add("large", 20, 100)  # 5
    p.hit("cheap")  # 2 * 4
    assert everything(p) == ["large", "cheap", "dear"]
    p.evict("large")  # the clock is 5
    p.add("new", 10, 40)  # 5 + 4
    assert everything(p) == ["cheap", "new", "dear"]
    p.evict("cheap")
    p.evict("new")  # the clock is 9
    p.add("newer", 10, 20)  # 9 + 2
    assert everything(p) == ["dear", "newer"]


def test_only_what_is_evicted_moves_the_clock() -> None:
    evicted, deleted = make_policy("pgdsf"), make_policy("pgdsf")
    for p, leave in (evicted, evicted.evict), (deleted, deleted.discard):
        p.add("old", 1, 8)
        leave("old")
        p.add("new", 1, 2)
    assert (evicted.held("new").use.clock, deleted.held("new").use.clock) == (8, 0)


def test_craft_adds_up_what_hits_were_worth() -> None:
    p = make_policy("craft")
    for key in "abc":
        p.add(key, 1, 1)
    p.hit("a", 4.0)  # CFO 1/4
    p.hit("b", 1.5)
    p.hit("b", 1.5)
    assert everything(p) == ["c", "b", "a"]
    p.hit("b")
    assert everything(p) == ["c", "a", "b"], "equals go by their last use"


def test_spared_chunks_stay_and_are_not_forgotten(name: str) -> None:
    p = make_policy(name)
    for key in range(5):
        p.add(key, 2, 1)
    assert p.victims(4, spared={0, 2}) == [1, 3]
    assert p.victims(4) == [0, 1]
    assert p.victims(0) == []
    assert p.victims(6, spared=range(5)) is None
    assert p.victims(11) is None
    assert everything(p) == [0, 1, 2, 3, 4]


def test_a_look_that_fails_forgets_nothing(name: str) -> None:
    class Broken:
        def __contains__(self, key: object) -> bool:
            if key == 2:
                raise OSError("no more")
            return True

    p = make_policy(name)
    for key in range(5):
        p.add(key, 2, 1)
    with pytest.raises(OSError, match="no more"):
        p.victims(1, spared=Broken())
    assert everything(p) == [0, 1, 2, 3, 4]


def test_what_is_gone_is_passed_over(name: str) -> None:
    p = make_policy(name)
    p.add("a", 3, 1)
    p.discard("a")
    p.discard("a")
    p.evict("a")
    p.hit("a")
    assert (len(p), p.bytes, "a" in p, p.victims(1)) == (0, 0, False, None)
    with pytest.raises(KeyError):
        p.held("a")


def test_added_again_it_starts_over(name: str) -> None:
    p = make_policy(name)
    p.add("a", 3, 1)
    p.hit("a", 5)
    p.add("a", 4, 2)
    assert (p.bytes, p.held("a").use) == (4, Usage(3, 1, 0, 0))


def test_hits_alone_do_not_fill_memory(name: str) -> None:
    p = make_policy(name)
    for key in range(10):
        p.add(key, 1, 1)
    for n in range(5000):
        p.hit(n % 10)
    assert len(p._heap) < 100 and everything(p) == list(range(10))


@pytest.mark.parametrize(
    ("size", "cost"), [(0, 1.0), (-1, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)]
)
def test_what_cannot_be_ranked_is_refused(name: str, size: int, cost: float) -> None:
    p = make_policy(name)
    p.add("a", 1, 1)
    with pytest.raises(ValueError, match="cannot be ranked"):
        p.add("a", size, cost)
    with pytest.raises(ValueError, match="cannot be ranked"):
        p.restore("b", 1, 1, Usage(1, 1, math.nan, 0))
    with pytest.raises(ValueError, match="a hit cannot be worth inf"):
        p.hit("a", math.inf)
    assert (p.bytes, everything(p)) == (1, ["a"])


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="'mru' is unknown: use one of lru, pgdsf, craft"):
        make_policy("mru")
    assert {name: cls.name for name, cls in POLICIES.items()} == {name: name for name in POLICIES}
