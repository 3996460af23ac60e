"""Refuse options that do not exist, with the name that was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

__all__ = ["check_options"]


def check_options(options: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise TypeError for unknown options of ``owner``; the message lists the known ones.

    >>> check_options(["tpo_k"], ["mode", "top_k"], "RagCache")
    Traceback (most recent call last):
    TypeError: tpo_k: unknown option of RagCache. Did you mean top_k? Its options are mode, top_k
    """
    if unknown := sorted(set(options) - set(known)):
        near = get_close_matches(unknown[0], known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(
            f"{', '.join(unknown)}: unknown option of {owner}.{meant} Its options are "
            + ", ".join(sorted(known))
        )
