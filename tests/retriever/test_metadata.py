"""Filters of metadata: every operator, a reference on random filters, and what is no filter."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from types import MappingProxyType
from typing import Any

import pytest

from ragcache.errors import ConfigError
from ragcache.retriever.metadata import TYPED, MetadataFilter, typed_metadata
from ragcache.text import replace_surrogates

DOCUMENT = typed_metadata(
    {
        "language": "en",
        "year": "2021",
        "draft": "false",
        "tags": '["a", "b"]',
        "date": "2024-05-31",
        "none": "null",
        "code": "007",
        TYPED: json.dumps({"pages": 12, "open": True, "score": 0.5, "authors": ["Ada", "Bo"]}),
    }
)


def passes(given: dict[str, Any]) -> bool:
    return MetadataFilter.of(given).passes(DOCUMENT)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"language": "en"},
        {"language": "en", "year": 2021},
        {"year": "2021"},
        {"year": 2021.0},
        {"year": {"$gte": 2021, "$lt": 2022}},
        {"year": {"$between": [2020, 2021]}},
        {"date": {"$between": ["2024-05", "2024-06"]}},
        {"date": {"$gt": "2024-05-30"}},
        {"draft": False},
        {"draft": {"$ne": True}},
        {"none": None},
        {"open": True},
        {"pages": 12},
        {"pages": {"$lte": 12.5}},
        {"score": {"$in": [1, 0.5]}},
        {"authors": ["Ada", "Bo"]},
        {"authors": {"$contains": "Bo"}},
        {"tags": {"$contains": "a"}},
        {"language": {"$in": ["de", "en"]}},
        {"language": {"$nin": ["de"]}},
        {"absent": {"$exists": False}},
        {"absent": {"$ne": 1}},
        {"absent": {"$nin": [1]}},
        {"language": {"$exists": True}},
        {"language": {"$not": {"$eq": "de"}}},
        {"$or": [{"year": 1}, {"language": "en"}]},
        {"$and": [{"year": 2021}, {"$not": {"language": "de"}}]},
    ],
)
def test_a_filter_that_the_document_passes(given: dict[str, Any]) -> None:
    assert passes(given)
    assert not passes({"$not": given})


@pytest.mark.parametrize(
    "given",
    [
        {"language": "EN"},
        {"year": {"$gt": 2021}},
        {"year": {"$gt": "3"}},  # texts are ordered by code points
        {"language": {"$gt": 1}},  # no number
        {"pages": "12"},  # a number is no text
        {"pages": {"$gte": "1"}},
        {"open": 1},  # a truth value is no number
        {"open": "true"},
        {"pages": True},
        {"code": 8},
        {"absent": None},
        {"absent": {"$lt": 3}},
        {"absent": {"$contains": 1}},
        {"language": {"$contains": "e"}},
        {"authors": {"$contains": "A"}},
        {"tags": {"$in": []}},
        {"$or": [{"year": 1}, {"year": 2}]},
    ],
)
def test_a_filter_that_the_document_does_not_pass(given: dict[str, Any]) -> None:
    assert not passes(given)


def test_the_key_of_typed_metadata_may_be_a_users_own() -> None:
    assert typed_metadata({TYPED: "yes", "a": "b"}) == {TYPED: "yes", "a": "b"}
    for other in ("[1]", "5", "[" * 16_000, "null"):
        assert typed_metadata({TYPED: other, "ragcache": "whole"}) == {TYPED: other}


def test_truth_values_equal_no_numbers_wherever_they_are() -> None:
    stored = {"l": [True], "d": {"k": [1, {"a": None}]}}
    for given, passing in (
        ({"l": [True]}, True),
        ({"l": [1]}, False),
        ({"d": {"k": [1.0, {"a": None}]}}, True),
        ({"d": {"k": [True, {"a": None}]}}, False),
        ({"d": {"$in": [{"k": [1, {"a": None}]}]}}, True),
        ({"l": {"$in": [[1], [True, True]]}}, False),
    ):
        assert MetadataFilter.of(given).passes(stored) is passing


def test_surrogates_are_replaced_as_in_what_is_stored() -> None:
    for given in ({"a": {"$in": ("\ud800x",)}}, MappingProxyType({"a": "\ud800x"})):
        assert MetadataFilter.of(given).passes({"a": replace_surrogates("\ud800x")})
    assert MetadataFilter.of({1: "a", "b": "b"}).passes({"1": "a", "b": "b"})  # type: ignore[dict-item]
    assert MetadataFilter.of({"a": "\ud800x"}).passes({"a": replace_surrogates("\ud800x")})


def test_a_long_list_is_looked_up_at_once() -> None:
    accepted = MetadataFilter.of({"a": {"$in": [*range(100_000), "b", None]}})
    assert [accepted.passes({"a": one}) for one in ("77", "b", 5, None, "c", True, -1)] == [
        *[True] * 4,
        *[False] * 3,
    ]


def test_numbers_of_one_hash_are_looked_up_in_time() -> None:
    alike = [n * (2**61 - 1) for n in range(1, 100_000)]  # all of hash 0
    accepted = MetadataFilter.of({"a": {"$in": [*alike, 0.5]}})
    assert accepted.passes({"a": str(alike[-1])}) and accepted.passes({"a": 0.5})
    assert not accepted.passes({"a": 1})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "filter is []: give an object"),
        ("en", 'filter is "en": give an object'),
        ({"year": {"$greater": 1}}, "filter.year.$greater is no operator"),
        ({"$gt": 1}, "filter.$gt is no operator of filters"),
        ({"$or": []}, "filter.$or is []: give a list of filters"),
        ({"$and": {"a": 1}}, 'filter.$and is {"a": 1}: give a list'),
        ({"$or": [{"a": 1}, 3]}, "filter.$or[1] is 3: give an object"),
        ({"$not": 1}, "filter.$not is 1"),
        ({"a": {"$in": "b"}}, 'filter.a.$in is "b": give a list'),
        ({"a": {"$gt": None}}, "filter.a.$gt is null: give a number or a text"),
        ({"a": {"$gt": True}}, "filter.a.$gt is true"),
        ({"a": {"$between": [1]}}, "filter.a.$between is [1]: give two numbers or two texts"),
        ({"a": {"$between": [1, "b"]}}, "give two numbers or two texts"),
        ({"a": {"$exists": 1}}, "filter.a.$exists is 1: give true or false"),
        ({"a": {"$eq": 1, "b": 2}}, "filter.a.b is no operator"),
        ({"a": float("nan")}, "cannot be written as JSON"),
        ({"a": {1, 2}}, "cannot be written as JSON"),
        ({"$or": [{"a": n} for n in range(50)]}, "more than 100 conditions"),
        ({"$and": [{}] * 100_000}, "more than 100 conditions"),
        ({"a": {"$in": [[]] * 100}}, "more than 100 conditions"),
        ({"k" * 100_000: {"$of": 1}}, "kkk....$of is no operator"),
        ({"a": object()}, "it has a object"),
        ({"a": "x" * 10_000, "$or": 1}, "filter.$or is 1"),
    ],
)
def test_what_is_no_filter_says_where(given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        MetadataFilter.of(given)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_a_filter_that_is_nested_too_deep_is_refused() -> None:
    given: dict[str, Any] = {"a": 1}
    for _ in range(21):
        given = {"$not": given}
    with pytest.raises(ConfigError, match="nested more than 20 deep"):
        MetadataFilter.of(given)
    inner: dict[str, Any] = {"$eq": 1}
    for _ in range(21):
        inner = {"$not": inner}
    with pytest.raises(ConfigError, match="nested more than 20 deep"):
        MetadataFilter.of({"a": inner})


def test_random_filters_equal_a_plain_reference() -> None:
    random = Random(0)
    documents = [
        {
            key: random.choice([random.randint(0, 5), random.choice("abc"), [random.choice("ab")]])
            for key in random.sample("xyz", random.randint(0, 3))
        }
        for _ in range(60)
    ]
    passed = 0
    for _ in range(1000):
        given = some_filter(random, 3)
        accepted = MetadataFilter.of(given)
        got = [accepted.passes(one) for one in documents]
        assert got == [reference(given, one) for one in documents], given
        passed += sum(got)
    assert 10_000 < passed < 50_000  # neither everything nor nothing


def some_filter(random: Random, depth: int) -> dict[str, Any]:
    kind = random.choice(["key", "key", "$and", "$or", "$not"]) if depth else "key"
    if kind == "$not":
        return {"$not": some_filter(random, depth - 1)}
    if kind != "key":
        return {kind: [some_filter(random, depth - 1) for _ in range(random.randint(1, 3))]}
    value: Any = random.choice([random.randint(0, 5), random.choice("abc")])
    other: Any = random.randint(0, 5) if isinstance(value, int) else random.choice("abc")
    choices: list[Any] = [
        value,
        *({name: value} for name in ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$contains")),
        {"$in": [value, other]},
        {"$nin": [value, other]},
        {"$between": [value, other]},
        {"$exists": random.random() < 0.5},
        {"$not": {"$gt": value}},
    ]
    return {key: random.choice(choices) for key in random.sample("xyz", random.randint(1, 2))}


def reference(given: dict[str, Any], document: dict[str, Any]) -> bool:
    """What a filter means, operator by operator, for values that are no text of a number."""
    return all(_holds(key, value, document) for key, value in given.items())


def _holds(key: str, value: Any, document: dict[str, Any]) -> bool:
    if key == "$and":
        return all(reference(one, document) for one in value)
    if key == "$or":
        return any(reference(one, document) for one in value)
    if key == "$not":
        return not reference(value, document)
    if not isinstance(value, dict):
        return bool(document.get(key) == value)
    [(name, given)] = value.items()
    stored = document.get(key)
    alike = type(stored) is type(given)
    if name == "$between":
        low, high = given
        return type(stored) is type(low) and low <= stored <= high  # type: ignore[operator]
    if name == "$not":
        return not _holds(key, given, document)
    holds: dict[str, Callable[[], bool]] = {
        "$eq": lambda: stored == given,
        "$ne": lambda: stored != given,
        "$gt": lambda: alike and stored > given,
        "$gte": lambda: alike and stored >= given,
        "$lt": lambda: alike and stored < given,
        "$lte": lambda: alike and stored <= given,
        "$in": lambda: stored in given,
        "$nin": lambda: stored not in given,
        "$contains": lambda: isinstance(stored, list) and given in stored,
        "$exists": lambda: (key in document) == given,
    }
    return holds[name]()
