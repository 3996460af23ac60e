"""Flash attention of sorted rows in Triton: a block of rows reads the keys up to its last row.

The rows of all query heads that share a KV head form one block, since they read the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    scale: float,
    blocks: Sequence[int],
) -> Tensor:
    """Causal attention of ``rows`` (sorted, int64): each sees the keys up to itself.

    ``query`` is (1, heads, rows, d), ``key`` and ``value`` are (1, kv_heads, n, d), the result is
    (1, rows, heads, d), all of one dtype, accumulated in float32. ``blocks``: the query vectors
    that a program may take, largest first; the largest that leaves two programs per multiprocessor
    is used, and at most 32 in float32.
    """
    _, heads, count, dim = query.shape
    kv_heads, share = key.shape[1], heads // key.shape[1]
    single = query.dtype == torch.float32
    block = _block(blocks, count * share, kv_heads, _processors(query.device))
    block = min(block, 32) if single else block
    query, key, value = map(_regular, (query, key, value))
    out = torch.empty(1, count, heads, dim, dtype=query.dtype, device=query.device)
    strides = [t.stride(axis) // dim for t in (query, key, value) for axis in (1, 2)]
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _attend[triton.cdiv(count * share, block), kv_heads](
            query, key, value, rows, out, count, *strides, scale * _LOG2E,
            SHARE=share, DIM=dim, WIDE=max(16, triton.next_power_of_2(dim)),
            BLOCK=block, KEYS=32 if single or dim > 128 else 64,
            num_warps=8 if block == 128 else 4, num_stages=2 if single or dim > 128 else 3,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _block(blocks: Sequence[int], vectors: int, kv_heads: int, processors: int) -> int:
    """The largest block that keeps the GPU busy: the longest program takes twice the mean time."""
    least = 2 * processors
    enough = (size for size in blocks if triton.cdiv(vectors, size) * kv_heads >= least)
    return next(enough, blocks[-1])


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _regular(tensor: Tensor) -> Tensor:
    """The tensor with contiguous vectors at strides that are multiples of their length."""
    dim = tensor.shape[3]
    regular = tensor.stride(3) == 1 and not tensor.stride(1) % dim and not tensor.stride(2) % dim
    return tensor if regular else tensor.contiguous()


@triton.jit(do_not_specialize=["count", "q_head", "q_row", "k_head", "k_row", "v_head", "v_row"])
def _attend(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,  # of rows
    q_head: tl.tensor,  # strides, in vectors of DIM
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    scale: tl.tensor,  # for exp2
    SHARE: tl.constexpr,  # query heads for each KV head
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # blocks with the most keys begin first
    group = tl.program_id(1).to(tl.int64)
    m = block * BLOCK + tl.arange(0, BLOCK)
    there = m < count * SHARE
    row = m // SHARE
    head = group * SHARE + m % SHARE
    d = tl.arange(0, WIDE)
    final = tl.minimum((block * BLOCK + BLOCK - 1) // SHARE, count - 1)
    last = tl.load(rows + final).to(tl.int32)
    position = tl.load(rows + row, mask=there, other=0).to(tl.int32)

    mask = there[:, None] & (d < DIM)[None]
    q = tl.load(query + (head * q_head + row * q_row)[:, None] * DIM + d[None], mask=mask, other=0)
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    key += group * k_head * DIM
    value += group * v_head * DIM

    for start in range(0, last + 1, KEYS):
        n = start + tl.arange(0, KEYS)
        seen = (n <= last)[:, None] & (d < DIM)[None]
        k = tl.load(key + (n * k_row)[:, None] * DIM + d[None], mask=seen, other=0)
        v = tl.load(value + (n * v_row)[:, None] * DIM + d[None], mask=seen, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where(n[None] <= position[:, None], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        less = tl.exp2(highest - new)
        weight = weight * less + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * less[:, None], input_precision="tf32x3")
        highest = new
    at = (row * tl.num_programs(1) * SHARE + head)[:, None] * DIM + d[None]
    tl.store(out + at, (total / weight[:, None]).to(out.dtype.element_ty), mask=mask)
