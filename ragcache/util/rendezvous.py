"""Rendezvous hashing (Thaler and Ravishankar, 1998): which of several servers a key belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

__all__ = ["home"]


def home(key: bytes, servers: Sequence[str]) -> str:
    """The server whose hash together with ``key`` is the largest.

    When a server is added or removed, only the keys that it gains or loses move. Raises ValueError
    if there are no servers.
    """
    return max(servers, key=lambda server: blake3(key + server.encode()).digest())
