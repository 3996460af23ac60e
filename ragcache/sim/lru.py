"""The least-recently-used set of chunks, as a store's RAM tier keeps them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

__all__ = ["K", "LruSet"]

K = TypeVar("K", bound=Hashable)


class LruSet(Generic[K]):
    """The chunks in a RAM tier of ``capacity`` bytes, in order of last use."""

    def __init__(self, sizes: Mapping[K, int], capacity: int) -> None:
        self._sizes, self._capacity = sizes, capacity
        self._chunks: OrderedDict[K, None] = OrderedDict()
        self._bytes = 0

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def use(self, chunks: Iterable[K]) -> tuple[list[K], list[K]]:
        """Use chunks in order; returns the chunks that entered RAM, and those that left it.

        A chunk of more than ``capacity`` bytes is never in RAM.
        """
        entered, left = dict[K, None](), dict[K, None]()
        for chunk in chunks:
            if chunk in self._chunks:
                self._chunks.move_to_end(chunk)
                continue
            size = self._sizes[chunk]
            if size > self._capacity:
                continue
            while self._bytes + size > self._capacity:
                evicted, _ = self._chunks.popitem(last=False)
                self._bytes -= self._sizes[evicted]
                _move(evicted, entered, left)
            self._chunks[chunk] = None
            self._bytes += size
            _move(chunk, left, entered)
        return list(entered), list(left)


def _move(chunk: K, back: dict[K, None], to: dict[K, None]) -> None:
    """Note a move: it cancels an earlier one in ``back``, or else is added to ``to``."""
    if chunk in back:
        del back[chunk]
    else:
        to[chunk] = None
