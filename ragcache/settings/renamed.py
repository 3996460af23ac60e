"""Accept the old names of settings, options, environment variables and keys for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from ragcache.errors import ConfigError

__all__ = ["RENAMED", "RenamedWarning", "by_new_names"]

T = TypeVar("T")

#: Old name -> new name.
RENAMED = {
    "compile": "encoding_context",
    "guard_floor": "monitor_floor",
    "guard_share": "monitor_share",
    "levels": "remote_codecs",
}


class RenamedWarning(FutureWarning):
    """A setting was given under an old name, which the next release will not accept."""


def by_new_names(
    given: Mapping[str, T],
    known: Collection[str],
    spelled: Callable[[str], str] = str,
    place: str = "",
) -> dict[str, T]:
    """``given`` with old names replaced by new ones; warns with RenamedWarning for each.

    Only names whose new name is in ``known`` are replaced. The value None means not given. For the
    messages, ``spelled`` returns how a name is written where it was given, such as ``--name``, and
    ``place`` says where that is. Raises ConfigError if an old and its new name have different
    values.
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
