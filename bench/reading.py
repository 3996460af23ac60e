"""How fast layers are read, compared with the hardware's limits: ``python -m bench.reading``.

Warm: a LayerReader (two threads) on a store in the page cache, and on the RAM tier, compared with
copying the same bytes in memory on one thread. Cold: the same on a store whose files were dropped
from the page cache, compared with a plain file of that size. *One file* is read from end to end
into one buffer, as dd does. *By layer* is the same file, read by two threads in the order in which
a store has to be read: the first layer of every chunk, then the second of every chunk, without
prefetching, checking or keeping anything. The three take turns at being first, since the host of
this machine may cache what was read. All rates are in GB/s and medians; ratios of cold figures are
medians of the ratios within a round. There is one table row per size of a layer.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench import results
from bench.serving import read
from ragcache.store import ChunkKey, DiskStore
from ragcache.store.tiers.ram import RamTier
from ragcache.types import ChunkKV, Fingerprint

HEADS, DIM = 8, 128  # bfloat16: 4 KiB a token and layer, as Llama-3.1-8B
LAYERS = 8
MODEL = Fingerprint((("weights", "random"),))
MIB = 1 << 20
TOKENS = 64, 512


@dataclass(frozen=True)
class Row:
    """GB/s, but for the first and the last two."""

    layer_bytes: int
    warm: float
    tier: float
    copy: float
    cold: float
    file: float
    by_layer: float
    cold_to_file: float  # no unit
    cold_to_by_layer: float  # no unit


def chunk(number: int, tokens: int) -> tuple[ChunkKey, ChunkKV]:
    ids = tuple(range(number, number + tokens))
    shape = (2, LAYERS, HEADS, tokens, DIM)
    keys, values = torch.randn(shape, generator=torch.manual_seed(number)).bfloat16()
    return ChunkKey(MODEL, ids), ChunkKV(ids, tuple(keys), tuple(values), (1.0,) * tokens)


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


def cold(
    folder: Path, keys: list[ChunkKey], layer_bytes: int, rounds: int
) -> tuple[float, float, float, float, float]:
    """GB/s of a LayerReader, and of as many bytes of one file in order and by layer; the ratio of
    the first to either."""
    size = len(keys) * LAYERS * layer_bytes
    plain = folder / "plain"
    plain.write_bytes(os.urandom(layer_bytes) * (size // layer_bytes))
    works = [
        partial(read_store, folder / "store", keys),
        partial(read_file, plain),
        partial(read_by_layer, plain, layer_bytes),
    ]
    rates: list[list[float]] = []
    for number in range(rounds):
        found = [0.0] * len(works)
        for turn in range(len(works)):
            which = (turn + number) % len(works)
            drop(folder)
            found[which] = size / works[which]() / 1e9
        rates.append(found)
    layers, file, by_layer = map(median, zip(*rates, strict=True))
    to_file, to_by_layer = (median(one[0] / one[n] for one in rates) for n in (1, 2))
    return layers, file, by_layer, to_file, to_by_layer


def read_store(folder: Path, keys: list[ChunkKey]) -> float:
    """Seconds, of a store that is open."""
    with DiskStore(folder, readonly=True) as store:
        began = time.perf_counter()
        read(store, keys)
        return time.perf_counter() - began


def read_file(path: Path) -> float:
    """Seconds."""
    piece = bytearray(MIB)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return time.perf_counter() - began


def read_by_layer(path: Path, layer_bytes: int) -> float:
    """Seconds. A layer is ``layer_bytes`` bytes of one chunk, a chunk :data:`LAYERS` of them."""
    chunk_bytes = LAYERS * layer_bytes
    handle = os.open(path, os.O_RDONLY)

    def read_layer(layer: int) -> None:
        room = bytearray(layer_bytes)
        for at in range(layer * layer_bytes, path.stat().st_size, chunk_bytes):
            os.preadv(handle, [room], at)

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read_layer, range(LAYERS)))
    taken = time.perf_counter() - began
    os.close(handle)
    return taken


def measure(
    tokens: Sequence[int] = TOKENS, *, mib: int = 256, rounds: int = 7, folder: Path | None = None
) -> list[Row]:
    """A row for chunks of each number of tokens, ``mib`` of KV in all, below ``folder``."""
    rows = []
    for count in tokens:
        bytes_each = 2 * 2 * HEADS * DIM * count * LAYERS
        with tempfile.TemporaryDirectory(dir=folder) as made:
            rows.append(row(Path(made), count, max(4, mib * MIB // bytes_each), rounds))
    return rows


def row(folder: Path, tokens: int, chunks: int, rounds: int) -> Row:
    made = dict(chunk(number, tokens) for number in range(chunks))
    keys, spec = list(made), made[next(iter(made))].spec
    size = chunks * spec.chunk_bytes(tokens)
    with RamTier(DiskStore(folder / "store"), size) as store:
        for key, kv in made.items():
            store.put(key, kv)
        disk = rate(size, lambda: read(store.below, keys), rounds)
        tier = rate(size, lambda: read(store, keys), rounds)
        held = [
            torch.cat((kv.keys[n], kv.values[n])) for n in range(LAYERS) for kv in made.values()
        ]
        room = [torch.zeros_like(both) for both in held]
        copy = rate(size, partial(copy_each, held, room), rounds)
    layer_bytes = spec.layer_bytes(tokens)
    return Row(layer_bytes, disk, tier, copy, *cold(folder, keys, layer_bytes, rounds))


def table(found: Sequence[Row]) -> str:
    heads = "a layer", "warm", "tier", "memcpy", "warm / memcpy", "cold", "one file", "by layer"
    ratios = "cold / file", "cold / by layer"
    rows = []
    for one in found:
        cells = [f"{one.layer_bytes >> 10} KiB", f"{one.warm:.1f}", f"{one.tier:.1f}"]
        cells += [f"{one.copy:.1f}", f"{one.warm / one.copy:.0%}"]
        cells += [f"{one.cold:.2f}", f"{one.file:.2f}", f"{one.by_layer:.2f}"]
        cells += [f"{one.cold_to_file:.0%}", f"{one.cold_to_by_layer:.0%}"]
        rows.append(cells)
    return results.table((*heads, *ratios), rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a chunk")
    parser.add_argument("--mib", type=int, default=256, help="of KV, in all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to make the store")
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("reading", found, table(found), out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
