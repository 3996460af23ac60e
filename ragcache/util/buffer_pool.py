"""Memory that goes from one tensor to the next: new memory costs more than the copy into it."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch

from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_HUGE = 2 << 20  # bytes of a huge page
SPARE_BYTES = 256 << 20  # kept for what comes: as much as a LayerReader asks for ahead


class _Block(np.ndarray):
    """Memory, or the part of it that is leased. A view of an array keeps the first array below it
    whose own base is of another class, so that views of a lease keep the lease."""


class BufferPool:
    """Memory for tensors that is used again once nothing refers to it any more. Thread-safe.

    Blocks are powers of two, so that chunks of other lengths can have them; the system gives no
    memory for the end of one that was never touched. Large new ones are in huge pages, where they
    can be had: a warm store is read into those in a third less time. Up to about ``spare_bytes``
    are kept. ``pin``: page-locked, for a GPU to copy from. Raises ConfigError where there is no
    CUDA.
    """

    def __init__(self, spare_bytes: int, *, pin: bool = False) -> None:
        if pin and not torch.cuda.is_available():
            raise ConfigError("memory cannot be pinned: torch finds no GPU here. Leave pin out.")
        self._spare_bytes, self._pin = spare_bytes, pin
        self._spare: dict[int, SimpleQueue[Bytes]] = {}  # by size

    def empty(self, nbytes: int) -> Bytes:
        """``nbytes`` bytes, at least 1, that are the caller's until this array, and all views and
        tensors of it, are gone."""
        size = 1 << (nbytes - 1).bit_length()
        try:
            block = self._queue(size).get_nowait()
        except Empty:
            block = self._new(size, nbytes).view(_Block)
        lease = block[:nbytes]
        weakref.finalize(lease, self._take_back, block).atexit = False
        return lease.view(np.ndarray)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The same as a tensor, not written yet."""
        lease = torch.from_numpy(self.empty(math.prod(shape) * dtype.itemsize))
        return lease.view(dtype).view(*shape)

    def clear(self) -> None:
        """Keep nothing, from now on."""
        self._spare_bytes = 0
        self._spare.clear()

    def _new(self, size: int, used: int) -> Bytes:
        """``size`` bytes, the first ``used`` of them in huge pages as far as they fill some."""
        whole = used // _HUGE * _HUGE
        if self._pin or not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin).numpy()
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, whole)
        return np.frombuffer(memory, np.uint8)

    def _take_back(self, block: Bytes) -> None:
        """Runs wherever a last reference goes, even inside the queue's own calls: no lock here."""
        spare = sum(size * queue.qsize() for size, queue in list(self._spare.items()))
        if spare + block.nbytes <= self._spare_bytes:
            self._queue(block.nbytes).put(block)

    def _queue(self, size: int) -> SimpleQueue[Bytes]:
        return self._spare.setdefault(size, SimpleQueue())
