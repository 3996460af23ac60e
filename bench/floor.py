"""What a store would save without the rows that `fused` always recomputes: ``python -m bench.floor
--set SETS/hotpotqa-split.jsonl``.

At a ratio of 15 %, `fused` computes the most sensitive 7.5 % of the rows in every prompt, whatever
is asked; with ``attention=0`` it is all 15 %. Chunks are encoded with and without them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.results import machine, table
from ragcache.core.fit_basis import codec_with_basis
from ragcache.core.precompute import precompute
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.models import SMOLLM2, model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.base import Miss
from ragcache.store.format.codecs import Codec, codec
from ragcache.store.memory import MemoryStore
from ragcache.types import ChunkKV

CODECS = "bfloat16", "cachegen", "kvtc8", "kvtc16", "kvtc20"
SHARES = 0.075, 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--set", type=Path, required=True, help="a file of bench.questions")
    parser.add_argument("--questions", type=int, default=3)
    given = parser.parse_args()
    engine, store = TransformersEngine.load(model_path(given.model), dtype="float32"), MemoryStore()
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    asked = first_questions(load_dataset(given.set), given.questions)
    tokens = dict.fromkeys(engine.template.chunk(text) for one in asked for text in one.chunks)
    keys = [encoding.key(engine.fingerprint, ids) for ids in tokens]
    precompute(engine, store, keys)
    known = [kv for key in keys if not isinstance(kv := store.get(key), Miss)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        for name in CODECS:
            full = codec_with_basis(engine, name, Path(folder)) if "kvtc" in name else name
            saved = (f"{share_saved(codec(full), known, share):.1%}" for share in SHARES)
            rows.append([name, *saved])
    heads = ["codec", *(f"bytes saved without {share:.1%} of the rows" for share in SHARES)]
    print(table(heads, rows))
    print(f"{given.model}, {len(known)} chunks, {sum(map(len, tokens)):,} tokens; {machine()}")


def share_saved(coded: Codec, chunks: list[ChunkKV], share: float) -> float:
    """The share of all bytes that the most sensitive ``share`` of every chunk's rows takes."""
    whole = rest = 0
    for kv in chunks:
        order = torch.tensor(kv.sensitivity).argsort(descending=True)
        whole += size(coded, kv, torch.arange(len(order)))
        rest += size(coded, kv, order[max(1, round(share * len(order))) :].sort().values)
    return 1 - rest / whole


def size(coded: Codec, kv: ChunkKV, rows: Tensor) -> int:
    pairs = [
        (keys[:, rows], values[:, rows]) for keys, values in zip(kv.keys, kv.values, strict=True)
    ]
    return sum(raw.size for raw in coded.encode_layers(pairs))


if __name__ == "__main__":
    main()
