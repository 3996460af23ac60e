"""Lists of things, told from one thing that was given in a list's place.

Python iterates over the characters of a string, the keys of a dictionary and the fields of a
document, so each of these passes for a list, and what is done with it goes wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from reprlib import repr as shortened
from typing import TypeVar

from ragcache.errors import ConfigError

Thing = TypeVar("Thing")


def require_list(given: Iterable[Thing], what: str, *kinds: type) -> Iterable[Thing]:
    """``given`` as it came, which must be a list or another iterable of things.

    Raises ConfigError for one thing: a string, a path, a mapping, one of ``kinds``, or what cannot
    be iterated over. ``what`` is what the caller calls them.

    >>> list(several(["holt", "mill"], "ids"))
    ['holt', 'mill']
    """
    alone = (str, bytes, PathLike, Mapping, *kinds)
    if isinstance(given, alone) or not isinstance(given, Iterable):
        such = "" if given is None else f", such as [{shortened(given)}]"
        raise ConfigError(f"{what} is {_a(given)}: give a list{such}")
    return given


def _a(given: object) -> str:
    return "None" if given is None else f"one {type(given).__name__}"
