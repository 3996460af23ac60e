"""A store of many chunks, of a model so small that ten thousand chunks fit on a laptop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.store.base import Miss
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.types import Chunk, Document

DIMENSION = 384  # of a chunk's vector
EACH = 10  # chunks of a document


def small() -> TransformersEngine:
    """A random model of 16 KiB a chunk and layer: a store of many is still a small one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=2048,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(TINY))
    model: Any = LlamaForCausalLM(config)
    return TransformersEngine(model, tokenizer, name="llama-small")


def fill(
    store: DiskStore, like: ChunkKey, numbers: range, told: Callable[[int, int], None]
) -> None:
    """Put chunks so numbered, in documents of EACH, with the KV of ``like`` under other keys."""
    catalog, kv = Catalog(store), store.get(like)
    assert not isinstance(kv, Miss)
    for first in numbers[::EACH]:
        rng = np.random.default_rng(first)
        ids = [tuple(row) for row in rng.integers(3, 2048, (EACH, len(like.tokens))).tolist()]
        keys = [replace(like, tokens=each) for each in ids]
        vectors = rng.standard_normal((EACH, DIMENSION)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        name = str(first)
        catalog.put_document(
            Document(name, ""),
            [Chunk(name, at, f"Chunk {at}.") for at in range(EACH)],
            vectors,
            b"",
            contents=[key.content for key in keys],
        )
        for key, each in zip(keys, ids, strict=True):
            store.put(key, replace(kv, tokens=each))
        told(first + EACH - numbers.start, len(numbers))
