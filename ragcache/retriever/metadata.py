"""Metadata of documents, and filters of it: which documents a search is over.

A filter is a mapping, in the form that LangChain's vector stores and MongoDB use::

    {"language": "en"}                                  equal
    {"year": {"$gte": 2020, "$lt": 2024}}               in a range
    {"tag": {"$in": ["a", "b"]}, "draft": {"$ne": True}}
    {"$or": [{"tag": "a"}, {"$not": {"year": {"$lt": 2020}}}]}

Several keys, and several operators of a key, must all hold.
"""

from __future__ import annotations

import json
import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from blake3 import blake3

from ragcache.errors import ConfigError
from ragcache.retriever.split import WHOLE
from ragcache.text import replace_surrogates_in

__all__ = ["TYPED", "Filter", "MetadataFilter", "typed_metadata"]

#: A filter as it is given, see :class:`MetadataFilter`.
Filter = Mapping[str, Any]

#: The key of metadata that are not text: a JSON object, as the only text in its place.
TYPED = "langchain"
_MOST_CONDITIONS = 100
_DEEPEST = 20

_Test = Callable[[Any], bool]  # of a stored value; _MISSING: there is none
_MISSING = object()


def typed_metadata(stored: Mapping[str, str]) -> dict[str, Any]:
    """Stored metadata with the values of :data:`TYPED` in place of it, if it is such an object, and
    without what ragcache itself has put there."""
    plain = {key: value for key, value in stored.items() if key not in (TYPED, *WHOLE)}
    if TYPED not in stored:
        return plain
    other = _parsed(stored[TYPED])
    return plain | (other if isinstance(other, dict) else {TYPED: stored[TYPED]})


@dataclass(frozen=True, slots=True)
class MetadataFilter:
    """Which metadata a document must have.

    A key maps to a value, which must be equal, or to operators: ``$eq``, ``$ne``, ``$gt``,
    ``$gte``, ``$lt``, ``$lte``, ``$between`` (two bounds, inclusive), ``$in``, ``$nin``,
    ``$contains`` (an element of a stored list) and ``$exists``. ``$and`` and ``$or`` take a list of
    filters, ``$not`` one filter, or operators of a key.

    A document without the key fails every operator but ``$ne``, ``$nin`` and ``$exists: false``.
    Most stored values are text. A number or a truth value of a filter also equals a text that is
    its JSON, and is compared with a text that is a number; a text of a filter equals no stored
    number. Texts are ordered by code points, so dates such as ``2024-05-31`` are ordered.
    """

    digest: bytes  # of what was given
    _passes: Callable[[Mapping[str, Any]], bool]

    @classmethod
    def of(cls, given: Filter) -> MetadataFilter:
        """Raises ConfigError, which says where, for anything that is not a filter."""
        try:
            text = json.dumps(given, allow_nan=False, default=_plain)
            plain = replace_surrogates_in(json.loads(text))
            text = json.dumps(plain, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"the filter cannot be written as JSON: {error}. Give texts, numbers and lists"
            ) from error
        return cls(blake3(text.encode()).digest(), _Parser().filter(plain, "filter", 0))

    def passes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document with this metadata, see :func:`typed_metadata`, is searched."""
        return self._passes(metadata)


class _Parser:
    """Makes predicates of metadata from filters, up to a size."""

    def __init__(self) -> None:
        self._conditions = 0

    def filter(self, given: Any, where: str, depth: int) -> Callable[[Mapping[str, Any]], bool]:
        if not isinstance(given, dict):
            raise ConfigError(
                f"{where} is {_shown(given)}: give an object of metadata keys and values, such as "
                '{"language": "en"}'
            )
        _check_depth(depth)
        self._count()
        every = [self._part(key, value, where, depth) for key, value in given.items()]
        return lambda metadata: all(one(metadata) for one in every)

    def _part(
        self, key: str, value: Any, where: str, depth: int
    ) -> Callable[[Mapping[str, Any]], bool]:
        here = f"{where}.{_cut(key)}"
        if key in ("$and", "$or"):
            if not isinstance(value, list) or not value:
                raise ConfigError(f"{here} is {_shown(value)}: give a list of filters")
            parts = [self.filter(e, f"{here}[{n}]", depth + 1) for n, e in enumerate(value)]
            join = all if key == "$and" else any
            return lambda metadata: join(one(metadata) for one in parts)
        if key == "$not":
            inner = self.filter(value, here, depth + 1)
            return lambda metadata: not inner(metadata)
        if key.startswith("$"):
            raise ConfigError(
                f"{here} is no operator of filters: use $and, $or or $not, or put a metadata key "
                "before it"
            )
        test = self._test(value, here, depth)
        return lambda metadata: test(metadata.get(key, _MISSING))

    def _test(self, given: Any, where: str, depth: int) -> _Test:
        """The test of a key's value."""
        _check_depth(depth)
        if not isinstance(given, dict) or not any(key.startswith("$") for key in given):
            return self._operator("$eq", given, where, depth)
        tests = [self._operator(name, value, where, depth) for name, value in given.items()]
        return lambda stored: all(test(stored) for test in tests)

    def _operator(self, name: str, given: Any, where: str, depth: int) -> _Test:
        self._count()
        here = f"{where}.{_cut(name)}"
        match name:
            case "$eq":
                return lambda stored: _equal(stored, given)
            case "$ne":
                return lambda stored: not _equal(stored, given)
            case "$in" | "$nin":
                is_one, wanted = self._one_of(_listed(given, here)), name == "$in"
                return lambda stored: wanted == is_one(stored)
            case "$gt" | "$gte" | "$lt" | "$lte":
                compare = _COMPARISONS[name]
                return _ordered(_bound(given, here), compare)
            case "$between":
                bounds = [_bound(one, f"{here}[{n}]") for n, one in enumerate(_listed(given, here))]
                if len(bounds) != 2 or isinstance(bounds[0], str) != isinstance(bounds[1], str):
                    raise ConfigError(f"{here} is {_shown(given)}: give two numbers or two texts")
                low, high = _ordered(bounds[0], operator.ge), _ordered(bounds[1], operator.le)
                return lambda stored: low(stored) and high(stored)
            case "$contains":
                return lambda stored: any(_equal(one, given) for one in _elements(stored))
            case "$exists":
                if not isinstance(given, bool):
                    raise ConfigError(f"{here} is {_shown(given)}: give true or false")
                return lambda stored: (stored is not _MISSING) == given
            case "$not":
                inner = self._test(given, here, depth + 1)
                return lambda stored: not inner(stored)
        raise ConfigError(f"{here} is no operator of filters: use {', '.join(_OPERATORS)}, or $not")

    def _one_of(self, values: Sequence[Any]) -> _Test:
        """A test whether a stored value equals one of many. Texts and numbers are looked up, and
        each other value is a condition."""
        texts = {one for one in values if isinstance(one, str)}
        numbers = sorted(one for one in values if _is_number(one))  # hashes of numbers collide
        others = [one for one in values if not isinstance(one, str) and not _is_number(one)]
        for _ in others:
            self._count()

        def test(stored: Any) -> bool:
            if isinstance(stored, str) and stored in texts:
                return True
            if numbers and (number := _number(stored)) is not None:
                at = bisect_left(numbers, number)
                if at < len(numbers) and numbers[at] == number:
                    return True
            return any(_equal(stored, one) for one in others)

        return test

    def _count(self) -> None:
        self._conditions += 1
        if self._conditions > _MOST_CONDITIONS:
            raise ConfigError(
                f"the filter has more than {_MOST_CONDITIONS} conditions: use $in for many values"
            )


_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_OPERATORS = "$eq", "$ne", *_COMPARISONS, "$between", "$in", "$nin", "$contains", "$exists"


def _equal(stored: Any, given: Any) -> bool:
    if isinstance(given, bool) or given is None:
        return stored is given or stored == json.dumps(given)
    if isinstance(given, (int, float)):
        return _number(stored) == given
    if isinstance(given, str):
        return isinstance(stored, str) and stored == given
    return _same(stored, given)


def _same(stored: Any, given: Any) -> bool:
    """Whether two values of JSON are equal; a truth value equals no number."""
    if isinstance(stored, bool) or isinstance(given, bool):
        return stored is given
    if isinstance(stored, list) and isinstance(given, list):
        return len(stored) == len(given) and all(map(_same, stored, given))
    if isinstance(stored, dict) and isinstance(given, dict):
        return stored.keys() == given.keys() and all(_same(stored[k], given[k]) for k in given)
    return bool(stored == given)


def _ordered(bound: float | str, compare: Callable[[Any, Any], bool]) -> _Test:
    """A test that compares a stored text, or number, with a bound of the same kind."""
    if isinstance(bound, str):
        return lambda stored: isinstance(stored, str) and compare(stored, bound)

    def test(stored: Any) -> bool:
        number = _number(stored)
        return number is not None and compare(number, bound)

    return test


def _number(stored: Any) -> float | None:
    """A stored number, or the number that a stored text is; None for anything else."""
    if isinstance(stored, str):
        stored = _parsed(stored)
    if not _is_number(stored):
        return None
    return stored if isinstance(stored, int) or math.isfinite(stored) else None


def _elements(stored: Any) -> Iterable[Any]:
    """The elements of a stored list, which may be the JSON of one."""
    if isinstance(stored, str):
        stored = _parsed(stored)
    return stored if isinstance(stored, list) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(given: Any) -> Any:
    """For JSON: a mapping of another type than dict. Raises TypeError for anything else."""
    if isinstance(given, Mapping):
        return dict(given)
    raise TypeError(f"it has a {type(given).__name__}")


def _parsed(text: str) -> Any:
    """The JSON value that a text is; None if it is none."""
    return _parse_short(text) if len(text) <= 32 else _parse(text)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_parse_short = lru_cache(maxsize=1 << 14)(_parse)  # numbers of one filter after the other


def _bound(given: Any, where: str) -> float | str:
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise ConfigError(f"{where} is {_shown(given)}: give a number or a text to compare with")
    return given


def _listed(given: Any, where: str) -> Sequence[Any]:
    if not isinstance(given, list):
        raise ConfigError(f"{where} is {_shown(given)}: give a list")
    return given


def _check_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise ConfigError(
            f"the filter is nested more than {_DEEPEST} deep: join its parts by one $and or $or"
        )


def _shown(given: Any) -> str:
    return _cut(json.dumps(given))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
