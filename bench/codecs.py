"""Size, speed and error of each codec: ``python -m bench.codecs``.

On KV of the small model that ships, chunk by chunk, and on one larger synthetic layer in bfloat16
(8 kv heads, 512 tokens, head_dim 128; normal channels, some of keys large). Rates count bytes of
raw KV over CPU time of one thread, the best of some rounds: other work on the machine does not
count. A layer is freed before the next is encoded. Errors are root mean squares relative to those
of the KV. Their effect on answers is measured elsewhere.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path, world_file
from ragcache.store.format.codecs import CODECS
from ragcache.store.format.codecs.base import Bytes, LayerCodec
from ragcache.types import ChunkKV, KVSpec

CHUNKS = 20
ROUNDS = 9


def small() -> list[ChunkKV]:
    engine = TransformersEngine.load(model_path(TINY))
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        texts = [text for line in lines for text in json.loads(line)["text"].split("\n\n")]
    return engine.encode([engine.tokenize(text) for text in texts[:CHUNKS]])


def large() -> list[ChunkKV]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    centres, spreads = draw(2, 8, 1, 128), draw(2, 8, 1, 128).abs() + 0.3
    centres[0] *= 1 + 8 * (torch.rand(8, 1, 128, generator=generator) < 0.03)
    keys, values = (centres + spreads * draw(2, 8, 512, 128)).bfloat16()
    return [ChunkKV(tuple(range(512)), (keys,), (values,))]


def seconds(work: Callable[[], None]) -> float:
    """CPU time of the fastest round, after one to warm up."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def error(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    pairs = list(zip(now, before, strict=True))
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    return float((off / sum(float(b.float().square().sum()) for _, b in pairs)) ** 0.5)


def row(name: str, codec: LayerCodec, chunks: list[ChunkKV]) -> str:
    spec = chunks[0].spec
    work = [
        (keys, values, layer, len(kv.tokens))
        for kv in chunks
        for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True))
    ]

    def encode(at: int) -> Bytes:
        keys, values, layer, _ = work[at]
        return codec.encode(keys, values, layer, spec.layers)

    def decode(at: int) -> tuple[Tensor, Tensor]:
        _, _, layer, tokens = work[at]
        return codec.decode(stored[at].copy(), spec, tokens, layer)

    def each(code: Callable[[int], object]) -> Callable[[], None]:
        def all_layers() -> None:
            for at in range(len(work)):
                code(at)

        return all_layers

    stored = [encode(at) for at in range(len(work))]
    encoding, decoding = seconds(each(encode)), seconds(each(decode))
    decoded = [decode(at) for at in range(len(work))]

    size = sum(data.size for data in stored)
    numbers = sum(2 * keys.numel() for keys, *_ in work)
    raw = numbers * spec.itemsize
    keys_off = error([keys for keys, _ in decoded], [keys for keys, *_ in work])
    values_off = error([values for _, values in decoded], [values for _, values, *_ in work])
    cells = (
        name,
        codec.name,
        f"{size / numbers:.3f}",
        f"{size / numbers / 2:.1%}",
        f"{size / numbers / 4:.1%}",
        f"{raw / encoding / 1e6:,.0f}",
        f"{raw / decoding / 1e6:,.0f}",
        f"{keys_off:.2%}",
        f"{values_off:.2%}",
    )
    return f"| {' | '.join(cells)} |"


def shape(spec: KVSpec, chunks: list[ChunkKV]) -> str:
    tokens = sum(len(kv.tokens) for kv in chunks) / len(chunks)
    return (
        f"{spec.layers} layers, {spec.kv_heads} kv heads, head_dim {spec.head_dim}, {spec.dtype}; "
        f"{len(chunks)} chunks of {tokens:.0f} tokens"
    )


def main() -> None:
    torch.set_num_threads(1)
    sets = {"small": small(), "large": large()}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    for name, chunks in sets.items():
        print(f"- {name}: {shape(chunks[0].spec, chunks)}")
    print()
    print(
        "| KV | codec | bytes a number | of bfloat16 | of float32 "
        "| encode MB/s | decode MB/s | error of K | of V |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, chunks in sets.items():
        for codec in CODECS.values():
            print(row(name, codec, chunks), flush=True)


if __name__ == "__main__":
    main()
