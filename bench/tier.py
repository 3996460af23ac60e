"""Reading KV layer by layer from disk and from the tier in RAM: ``python -m bench.tier``.

One thread reads the chunks of a prompt as for a fusion, layer 0 of each, then layer 1, and lets
go of all at the end: what a LayerReader reads ahead lives as long. The disk store's pages are in
the page cache. *memcpy* copies each layer, and nothing else, into memory that was there before: no
tier that gives its callers tensors of their own is faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from ragcache.store import ChunkKey, ChunkStore, DiskStore
from ragcache.store.tier import TieredStore
from ragcache.types import ChunkKV, Fingerprint

HEADS, DIM = 8, 128  # bfloat16: 4 KiB a token and layer, as Llama-3.1-8B
CHUNKS, LAYERS = 4, 8
MODEL = Fingerprint((("weights", "random"),))


def chunk(number: int, tokens: int) -> tuple[ChunkKey, ChunkKV]:
    ids = tuple(range(number, number + tokens))
    shape = (2, LAYERS, HEADS, tokens, DIM)
    keys, values = torch.randn(shape, generator=torch.manual_seed(number)).bfloat16()
    return ChunkKey(MODEL, ids), ChunkKV(ids, tuple(keys), tuple(values), (1.0,) * tokens)


def read(store: ChunkStore, keys: list[ChunkKey]) -> list[tuple[Tensor, Tensor]]:
    return [store.layer(key, layer) for layer in range(LAYERS) for key in keys]


def copy_each(held: list[Tensor], room: list[Tensor]) -> None:
    for both, into in zip(held, room, strict=True):
        into.copy_(both)


def rate(size: int, work: Callable[[], object], rounds: int) -> float:
    """GB/s, the median of ``rounds`` after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return size / median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="of a chunk")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="where to make the store; by default a temporary one")
    given = parser.parse_args()
    print("| a layer of a chunk | disk, GB/s | tier, GB/s | memcpy, GB/s |\n|--:|--:|--:|--:|")
    for tokens in given.tokens:
        made = dict(chunk(number, tokens) for number in range(CHUNKS))
        keys, spec = list(made), made[next(iter(made))].spec
        size = CHUNKS * spec.chunk_bytes(tokens)
        with (
            tempfile.TemporaryDirectory(dir=given.folder) as folder,
            TieredStore(DiskStore(folder), size) as store,
        ):
            for key, kv in made.items():
                store.put(key, kv)
            disk = rate(size, lambda: read(store.below, keys), given.rounds)  # noqa: B023
            tier = rate(size, lambda: read(store, keys), given.rounds)  # noqa: B023
            held = [torch.stack(store.below.layer(k, n)) for n in range(LAYERS) for k in keys]
            room = [torch.zeros_like(both) for both in held]
            copy = rate(size, lambda: copy_each(held, room), given.rounds)  # noqa: B023
            assert store.tier.misses == len(held), "all but the first round came from RAM"
            for key, kv in made.items():
                for layer in range(LAYERS):
                    got = store.layer(key, layer)
                    assert torch.equal(got[0], kv.keys[layer])
                    assert torch.equal(got[1], kv.values[layer])
        print(f"| {spec.layer_bytes(tokens) >> 10} KiB | {disk:.1f} | {tier:.1f} | {copy:.1f} |")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
