"""Remember the parts of earlier prompts, to tell a part that was edited from a new one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ragcache.store.key import ChunkKey
from ragcache.types import Tokens

_Trait = tuple[str, Tokens | str]

_ENDS = 16  # tokens at either end of a part by which similar ones are found
_MOST_TOKENS = 1 << 20  # of all parts, 4 bytes each


@dataclass(frozen=True, slots=True)
class _SeenPart:
    tokens: NDArray[np.uint32]
    stored: bool  # whether its KV was found in the store at least once
    traits: tuple[_Trait, ...]  # those by which it is found


class SeenParts:
    """The latest parts of prompts, at most ``capacity``. Thread-safe.

    They are known by their keys. An unknown part is similar to one with the same first or last 16
    tokens, or with the same name and half of its different tokens.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._parts: OrderedDict[bytes, _SeenPart] = OrderedDict()
        self._by_trait: dict[_Trait, bytes] = {}
        self._tokens = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._parts)

    def add(self, key: ChunkKey, name: str = "", *, stored: bool) -> None:
        """Remember a part. ``stored``: whether its KV was found in the store."""
        with self._lock:
            before = self._remove(key.digest)
            if before is None:
                tokens = np.asarray(key.tokens, dtype=np.uint32)
            else:
                tokens, stored = before.tokens, stored or before.stored
            traits = tuple(_traits(key.tokens, name))
            self._parts[key.digest] = _SeenPart(tokens, stored, traits)
            self._by_trait.update(dict.fromkeys(traits, key.digest))
            self._tokens += len(tokens)
            while len(self._parts) > self._capacity or self._tokens > _MOST_TOKENS:
                self._remove(next(iter(self._parts)))

    def was_stored(self, key: ChunkKey) -> bool | None:
        """Whether the KV of a part has been found in the store; None if the part is unknown."""
        with self._lock:
            found = self._parts.get(key.digest)
        return None if found is None else found.stored

    def similar(self, tokens: Tokens, name: str = "") -> Tokens | None:
        """The tokens of the known part that is most similar to an unknown one, which may be the
        same behind other text; None if no part is similar."""
        own = np.asarray(tokens, dtype=np.uint32)
        every = []
        with self._lock:
            for trait in _traits(tokens, name):
                if (digest := self._by_trait.get(trait)) is not None:
                    other = self._parts[digest].tokens
                    if trait[0] != "name" or _share(own, other) >= 0.5:
                        every.append(other)
        best = max(every, key=lambda other: _in_common(own, other), default=None)
        return None if best is None else tuple(best.tolist())

    def _remove(self, digest: bytes) -> _SeenPart | None:
        part = self._parts.pop(digest, None)
        if part is not None:
            self._tokens -= len(part.tokens)
            for trait in part.traits:
                if self._by_trait.get(trait) == digest:
                    del self._by_trait[trait]
        return part


def _traits(tokens: Tokens, name: str) -> Iterator[_Trait]:
    yield "first", tokens[:_ENDS]
    yield "last", tokens[-_ENDS:]
    if name:
        yield "name", name


def _share(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """The share of the different tokens of ``one`` that ``other`` has too."""
    return float(np.isin(np.unique(one), other).mean())


def _in_common(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> int:
    """The number of tokens at the beginning and the end that two parts have in common."""
    length = min(len(one), len(other))
    first = np.flatnonzero(one[:length] != other[:length])
    last = np.flatnonzero(one[len(one) - length :] != other[len(other) - length :])
    if not len(first) or not len(last):
        return length
    return int(first[0]) + length - 1 - int(last[-1])
