"""Place a layer's stored KV on a GPU with one kernel launch, rotating the keys (Triton)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragcache.types import KVPair

_TOKENS = 32  # tokens per program, of one part and one head
_ALIGNED = 16  # bytes


def place(parts: Sequence[KVPair], angles: KVPair | None, out: KVPair) -> None:
    """Write ``parts``, one after another, to the first rows of ``out``.

    Parts are keys and values, (kv_heads, n, head_dim) each, all of one dtype. ``out`` are a layer's
    keys and values from the parts' first row on, (kv_heads, rows, head_dim), contiguous within a
    head. ``angles`` are cos and sin of these rows, (rows, rotary_dim): keys are rotated in float32,
    dimension i with i + rotary_dim / 2, and cast once; None leaves them as they are. All tensors
    are on one device.
    """
    keys, values = out
    heads, _, dim = keys.shape
    device, first = keys.device, parts[0]
    assert len({(k.dtype, v.dtype) for k, v in parts}) == 1, "chunks of a store have one dtype"
    held = [(_aligned(k), _aligned(v)) for k, v in parts]
    starts, rows = [], 0
    for k, _ in held:
        starts.append(rows)
        rows += k.shape[1]
    table = torch.tensor(
        [
            (k.data_ptr(), v.data_ptr(), start, k.shape[1])
            for (k, v), start in zip(held, starts, strict=True)
        ],
        pin_memory=device.type == "cuda",  # otherwise the copy waits for queued kernels
    ).to(device, non_blocking=True)
    cos, sin = (t.contiguous() for t in angles or first)
    half = 0 if angles is None else cos.shape[-1] // 2
    blocks = triton.cdiv(max(k.shape[1] for k, _ in held), _TOKENS)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        _place[blocks, len(held), heads](
            table, *first, cos, sin, keys, values, _apart(keys), _apart(values),
            DIM=dim, HALF=half, WIDE=triton.next_power_of_2(dim),
            TURNS=triton.next_power_of_2(max(half, 1)), TOKENS=_TOKENS, enable_fp_fusion=True,
        )  # fmt: skip


def _aligned(part: Tensor) -> Tensor:
    part = part.contiguous()
    return part if part.data_ptr() % _ALIGNED == 0 else part.clone()


def _apart(out: Tensor) -> int:
    """Rows from one head to the next."""
    assert out.stride(2) == 1 and out.stride(1) == out.shape[2], "rows of a PlacedKV are together"
    return out.stride(0) // out.shape[2]


@triton.jit(do_not_specialize=["k_apart", "v_apart"])
def _place(
    table: tl.tensor,  # (parts, 4), int64: addresses of keys and values, first row, rows
    k_kind: tl.tensor,  # keys and values of any part, for their dtypes
    v_kind: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    k_apart: tl.tensor,
    v_apart: tl.tensor,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of the rotated dimensions
    WIDE: tl.constexpr,
    TURNS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    entry = table + tl.program_id(1) * 4
    count = tl.load(entry + 3)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(0) * TOKENS < count:
        head = tl.program_id(2).to(tl.int64)
        there = (token < count)[:, None]
        row = tl.load(entry + 2) + token
        source = (head * count + token)[:, None] * DIM
        d = tl.arange(0, WIDE)[None]

        v = tl.multiple_of(tl.load(entry + 1).to(v_kind.dtype), 16)
        at = (head * v_apart + row)[:, None] * DIM
        mask = there & (d < DIM)
        value = tl.load(v + source + d, mask=mask)
        tl.store(values + at + d, value.to(values.dtype.element_ty), mask=mask)

        k = tl.multiple_of(tl.load(entry).to(k_kind.dtype), 16)
        at = (head * k_apart + row)[:, None] * DIM
        if HALF > 0:
            i = tl.arange(0, TURNS)[None]
            turns = there & (i < HALF)
            angle = row[:, None] * (2 * HALF) + i
            a = tl.load(k + source + i, mask=turns).to(tl.float32)
            b = tl.load(k + source + HALF + i, mask=turns).to(tl.float32)
            low = a * tl.load(cos + angle, mask=turns).to(tl.float32)
            low -= b * tl.load(sin + angle, mask=turns).to(tl.float32)
            high = b * tl.load(cos + angle + HALF, mask=turns).to(tl.float32)
            high += a * tl.load(sin + angle + HALF, mask=turns).to(tl.float32)
            tl.store(keys + at + i, low.to(keys.dtype.element_ty), mask=turns)
            tl.store(keys + at + HALF + i, high.to(keys.dtype.element_ty), mask=turns)
        if 2 * HALF < DIM:
            mask = there & (d >= 2 * HALF) & (d < DIM)
            rest = tl.load(k + source + d, mask=mask)
            tl.store(keys + at + d, rest.to(keys.dtype.element_ty), mask=mask)
