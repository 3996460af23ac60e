"""How fast layers come from a store, beside what the machine can do: ``python -m bench.reading``.

Warm: a LayerReader (two threads) on a store in the page cache, and on the tier in RAM, beside
copying the same bytes in memory, on one thread. Cold: the same on a store whose files were dropped
from the page cache, beside reading a file of that size from end to end, as dd does. One table row
per size of a layer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ragcache.store import ChunkKey, ChunkStore, DiskStore, LayerReader, Stored
from ragcache.store.tier import TieredStore
from ragcache.types import ChunkKV, Fingerprint

HEADS, DIM = 8, 128  # bfloat16: 4 KiB a token and layer, as Llama-3.1-8B
LAYERS = 8
MODEL = Fingerprint((("weights", "random"),))
MIB = 1 << 20


def chunk(number: int, tokens: int) -> tuple[ChunkKey, ChunkKV]:
    ids = tuple(range(number, number + tokens))
    shape = (2, LAYERS, HEADS, tokens, DIM)
    keys, values = torch.randn(shape, generator=torch.manual_seed(number)).bfloat16()
    return ChunkKey(MODEL, ids), ChunkKV(ids, tuple(keys), tuple(values), (1.0,) * tokens)


def read(store: ChunkStore, keys: list[ChunkKey]) -> None:
    """Layer by layer; a layer is let go of when the next one comes, as in a fusion."""
    found = [one for one in map(store.peek, keys) if isinstance(one, Stored)]
    with LayerReader(store, found) as reader:
        reader.start(range(LAYERS))
        for layer in range(LAYERS):
            reader.layer(layer)


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


def drop(folder: Path) -> None:
    """Everything below ``folder`` out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, keys: list[ChunkKey], size: int) -> tuple[float, float]:
    """GB/s of a LayerReader, and of reading as many bytes from one file in order."""
    plain = folder / "plain"
    plain.write_bytes(os.urandom(MIB) * (size // MIB))
    drop(folder)
    with DiskStore(folder / "store", readonly=True) as store:
        began = time.perf_counter()
        read(store, keys)
        layers = size / (time.perf_counter() - began) / 1e9
    drop(folder)
    began = time.perf_counter()
    with plain.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    return layers, size // MIB * MIB / (time.perf_counter() - began) / 1e9


def row(folder: Path, tokens: int, chunks: int, rounds: int) -> str:
    made = dict(chunk(number, tokens) for number in range(chunks))
    keys, spec = list(made), made[next(iter(made))].spec
    size = chunks * spec.chunk_bytes(tokens)
    with TieredStore(DiskStore(folder / "store"), size) as store:
        for key, kv in made.items():
            store.put(key, kv)
        disk = rate(size, lambda: read(store.below, keys), rounds)
        tier = rate(size, lambda: read(store, keys), rounds)
        held = [
            torch.cat((kv.keys[n], kv.values[n])) for n in range(LAYERS) for kv in made.values()
        ]
        room = [torch.zeros_like(both) for both in held]
        copy = rate(size, partial(copy_each, held, room), rounds)
    layers, plain = cold(folder, keys, size)
    cells = [f"{spec.layer_bytes(tokens) >> 10} KiB", f"{disk:.1f}", f"{tier:.1f}", f"{copy:.1f}"]
    cells += [f"{disk / copy:.0%}", f"{layers:.2f}", f"{plain:.2f}", f"{layers / plain:.0%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="of a chunk")
    parser.add_argument("--mib", type=int, default=256, help="of KV, in all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to make the store")
    given = parser.parse_args()
    heads = "a layer", "warm", "tier", "memcpy", "warm / memcpy", "cold", "one file", "cold / file"
    print(f"GB/s, {len(os.sched_getaffinity(0))} cores\n\n| {' | '.join(heads)} |")
    print("|" + "--:|" * len(heads))
    for tokens in given.tokens:
        bytes_each = 2 * 2 * HEADS * DIM * tokens * LAYERS
        chunks = max(4, given.mib * MIB // bytes_each)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            print(row(Path(folder), tokens, chunks, given.rounds), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
