"""Which chunks are in RAM: those that were used last, as a tier in RAM holds them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LruSet(Generic[K]):
    """Chunks in RAM by their last use, as a tier of ``capacity`` bytes holds them."""

    def __init__(self, sizes: Mapping[K, int], capacity: int) -> None:
        self._sizes, self._capacity = sizes, capacity
        self._chunks: OrderedDict[K, None] = OrderedDict()
        self._bytes = 0

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def use(self, chunks: Iterable[K]) -> tuple[list[K], list[K]]:
        """Use these one after another; the chunks that came into RAM by it, and those that left."""
        entered, left = dict[K, None](), dict[K, None]()
        for chunk in chunks:
            if chunk in self._chunks:
                self._chunks.move_to_end(chunk)
                continue
            size = self._sizes[chunk]
            if size > self._capacity:
                continue
            while self._bytes + size > self._capacity:
                gone, _ = self._chunks.popitem(last=False)
                self._bytes -= self._sizes[gone]
                _move(gone, entered, left)
            self._chunks[chunk] = None
            self._bytes += size
            _move(chunk, left, entered)
        return list(entered), list(left)


def _move(chunk: K, back: dict[K, None], to: dict[K, None]) -> None:
    """Take a chunk out of ``back``, if it is there: it is where it was at first. Else put it into
    ``to``."""
    if chunk in back:
        del back[chunk]
    else:
        to[chunk] = None
