"""Keys and KV for tests of stores: small, random and repeatable."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ragcache.store.base import Miss, StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV, Fingerprint, Tokens

MODEL = Fingerprint((("weights", "a8b6"), ("dtype", "float32")), "tiny")
OTHER = Fingerprint((("weights", "9f11"), ("dtype", "float32")), "tiny")  # another model

LAYERS, HEADS, DIM = 3, 2, 8


def make_key(first: int = 0, fingerprint: Fingerprint = MODEL, context: Tokens = ()) -> ChunkKey:
    """A key of 5 tokens, which begin with ``first``."""
    return ChunkKey(fingerprint, tuple(range(first, first + 5)), context)


def make_kv(key: ChunkKey, seed: int = 0, dtype: torch.dtype = torch.float32) -> ChunkKV:
    """Random KV of 3 layers for the tokens of ``key``; other seeds give other values."""
    generator = torch.Generator().manual_seed(seed * 100_003 + key.tokens[0])

    def layers() -> tuple[Tensor, ...]:
        shape = (HEADS, len(key.tokens), DIM)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(LAYERS))

    sensitivity = torch.rand(len(key.tokens), generator=generator).tolist()
    return ChunkKV(key.tokens, layers(), layers(), tuple(sensitivity))


def same(left: ChunkKV | Miss, right: ChunkKV | Miss) -> bool:
    """Whether both are equal bit for bit, dtype included; misses by reason and detail."""
    if isinstance(left, Miss) or isinstance(right, Miss):
        return left == right
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    known = left.tokens, left.sensitivity
    return known == (right.tokens, right.sensitivity) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


def unversioned(found: StoredChunk | Miss) -> StoredChunk | Miss:
    """``found`` without its version, which differs between stores, so that two can be compared."""
    return found if isinstance(found, Miss) else replace(found, version=0)
