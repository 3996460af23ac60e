"""Check that an argument is a list, and not a single item in place of one.

Python iterates over the characters of a string, the keys of a dictionary and the fields of a model,
so these would pass for a list and give wrong results without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from reprlib import repr as shortened
from typing import TypeVar

from ragcache.errors import ConfigError

__all__ = ["require_list"]

Item = TypeVar("Item")


def require_list(given: Iterable[Item], what: str, *kinds: type) -> Iterable[Item]:
    """Return ``given``, which must be a list or another iterable of items.

    Raises ConfigError for a single item: a string, a path, a mapping, an instance of ``kinds``, or
    an object that is not iterable. ``what`` is the argument's name in the message.

    >>> list(require_list(["holt", "mill"], "ids"))
    ['holt', 'mill']
    """
    single = (str, bytes, PathLike, Mapping, *kinds)
    if isinstance(given, single) or not isinstance(given, Iterable):
        example = "" if given is None else f", such as [{shortened(given)}]"
        raise ConfigError(f"{what} is {_a(given)}: give a list{example}")
    return given


def _a(given: object) -> str:
    return "None" if given is None else f"one {type(given).__name__}"
