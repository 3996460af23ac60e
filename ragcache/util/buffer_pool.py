"""A pool of memory for tensors: allocating new memory costs more than copying into it."""

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

__all__ = ["BufferPool", "SPARE_BYTES"]

_HUGE = 2 << 20  # bytes of a huge page
SPARE_BYTES = 256 << 20  # kept for reuse by default: as much as a LayerReader reads ahead


class _Block(np.ndarray):
    """A block of memory, or the part of it that is leased.

    A NumPy view refers to the first array below it whose base is of another class. So views of a
    lease keep the lease alive, and not the block.
    """


class BufferPool:
    """Memory for tensors that is reused once nothing refers to it. Thread-safe.

    Block sizes are powers of two, so that chunks of different lengths can share them; the end of a
    block that is never written takes no physical memory. Large blocks use huge pages if available,
    which makes reading a warm store a third faster. Up to about ``spare_bytes`` are kept for reuse.
    ``pin``: page-locked memory, for copies to a GPU; raises ConfigError without CUDA.
    """

    def __init__(self, spare_bytes: int, *, pin: bool = False) -> None:
        if pin and not torch.cuda.is_available():
            raise ConfigError("memory cannot be pinned: torch finds no GPU here. Leave pin out.")
        self._spare_bytes, self._pin = spare_bytes, pin
        self._spare: dict[int, SimpleQueue[Bytes]] = {}  # by size

    def empty(self, nbytes: int) -> Bytes:
        """An uninitialised array of ``nbytes`` >= 1 bytes.

        Its memory is reused once the array, its views and tensors of it are freed.
        """
        size = 1 << (nbytes - 1).bit_length()
        try:
            block = self._queue(size).get_nowait()
        except Empty:
            block = self._new(size, nbytes).view(_Block)
        lease = block[:nbytes]
        weakref.finalize(lease, self._take_back, block).atexit = False
        return lease.view(np.ndarray)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, whose memory is reused as that of :meth:`empty`."""
        lease = torch.from_numpy(self.empty(math.prod(shape) * dtype.itemsize))
        return lease.view(dtype).view(*shape)

    def clear(self) -> None:
        """Free all spare blocks, and keep none from now on."""
        self._spare_bytes = 0
        self._spare.clear()

    def _new(self, size: int, used: int) -> Bytes:
        """A new block of ``size`` bytes; whole huge pages of the first ``used`` bytes are huge."""
        whole = used // _HUGE * _HUGE
        if self._pin or not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin).numpy()
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, whole)
        return np.frombuffer(memory, np.uint8)

    def _take_back(self, block: Bytes) -> None:
        """Called wherever the last reference is dropped, even inside the queue: must not lock."""
        spare = sum(size * queue.qsize() for size, queue in list(self._spare.items()))
        if spare + block.nbytes <= self._spare_bytes:
            self._queue(block.nbytes).put(block)

    def _queue(self, size: int) -> SimpleQueue[Bytes]:
        return self._spare.setdefault(size, SimpleQueue())
