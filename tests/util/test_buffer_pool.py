"""Memory is reused only when nothing refers to it any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ragcache.errors import ConfigError
from ragcache.util.buffer_pool import BufferPool

VIEWS: dict[str, Callable[[Any], object]] = {
    "array": lambda a: a,
    "view": lambda a: a[10:20],
    "view of a view": lambda a: a[10:20][2:].view("int16"),
    "tensor": torch.from_numpy,
    "view of a tensor of a view": lambda a: torch.from_numpy(a[8:]).view(torch.int32)[3:].view(-1),
    "buffer": lambda a: memoryview(a[3:]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_is_given_again_when_nothing_refers_to_it(view: Callable[[Any], object]) -> None:
    blocks = BufferPool(1 << 20)
    first = blocks.empty(128)
    where = first.ctypes.data
    kept = view(first)
    del first
    others = [blocks.empty(100) for _ in range(3)]
    assert where not in [other.ctypes.data for other in others]
    del kept
    assert blocks.empty(70).ctypes.data == where  # another length of the same power of two


def test_a_tensor_has_its_shape_and_its_memory() -> None:
    blocks = BufferPool(1 << 20)
    one = blocks.tensor((2, 3, 5), torch.bfloat16)
    assert one.shape == (2, 3, 5) and one.dtype == torch.bfloat16 and one.is_contiguous()
    where, layer = one.data_ptr(), one[1]
    del one
    another = blocks.tensor((2, 3, 5), torch.bfloat16)
    assert another.data_ptr() != where
    del layer
    assert blocks.tensor((15, 2), torch.bfloat16).data_ptr() == where


@pytest.mark.parametrize("size", [100, 1 << 20, (2 << 20) + 5, 9 << 20])
def test_memory_of_any_size_is_aligned_and_can_be_written(size: int) -> None:
    one = BufferPool(0).empty(size)
    one[:] = 7
    assert one.nbytes == size and one.ctypes.data % 64 == 0
    assert int(one.sum(dtype="int64")) == 7 * size


def test_no_more_is_kept_than_may_be() -> None:
    blocks = BufferPool(4096)
    several = [blocks.empty(2048) for _ in range(5)]
    where = {one.ctypes.data for one in several}
    del several
    again = [blocks.empty(2048) for _ in range(2)]
    assert {one.ctypes.data for one in again} <= where
    assert sum(queue.qsize() for queue in blocks._spare.values()) == 0
    blocks.clear()
    del again
    assert blocks._spare == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_memory_is_pinned_for_a_gpu_only() -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        BufferPool(0, pin=True)
