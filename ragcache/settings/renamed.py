"""Old names of settings, and of their options, variables and keys, which work for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from ragcache.errors import ConfigError

__all__ = ["RENAMED", "RenamedWarning", "by_new_names"]

T = TypeVar("T")

#: Old names, and the names of today.
RENAMED = {
    "compile": "encoding_context",
    "guard_floor": "monitor_floor",
    "guard_share": "monitor_share",
    "levels": "remote_codecs",
}


class RenamedWarning(FutureWarning):
    """A setting was given by a name that the next release will not accept."""


def by_new_names(
    given: Mapping[str, T],
    known: Collection[str],
    spelled: Callable[[str], str] = str,
    place: str = "",
) -> dict[str, T]:
    """``given`` with today's names in place of old ones, and a RenamedWarning for each.

    Only names that became one of ``known`` are replaced. None means not given. ``spelled`` tells
    how a name is written where it was given, and ``place`` where that is. Raises ConfigError where
    an old and a new name have different values.
    """
    found = dict(given)
    for old, new in RENAMED.items():
        if new not in known or (value := found.pop(old, None)) is None:
            continue
        was, now = spelled(old), spelled(new)
        if found.get(new) not in (None, value):
            raise ConfigError(
                f"{place}{was} and {now} are two names of one setting and have different values: "
                f"leave {was} out"
            )
        found[new] = value
        warnings.warn(
            f"{place}{was} is now called {now}: use that name, because the next release will not "
            f"accept {was}",
            RenamedWarning,
            stacklevel=2,
        )
    return found
