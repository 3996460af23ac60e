"""A tier forwards every call; the contract tests check the results."""

from __future__ import annotations

from ragcache.store import ChunkStore
from ragcache.store.tiers.base import Tier


def test_every_call_is_passed_on() -> None:
    """Also those that have a default: below they may do better than that."""
    called = {name for name, what in vars(ChunkStore).items() if callable(what)}
    passed = {name for name, what in vars(Tier).items() if callable(what)}
    assert {name for name in called - passed if not name.startswith("_")} == set()
