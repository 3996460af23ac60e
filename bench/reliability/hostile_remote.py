"""Malicious objects in a remote: ``python -m bench.reliability hostile-remote``.

Under the right name there is a record that is damaged, or intact but of another shape, dtype,
codec, chunk or model, contains NaN, claims gigabytes, or is not a file. It is read by an answer and
by ``pull``. Both must get the original KV or nothing, in bounded time and memory, and nothing else
may be stored.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.samples import MODEL, SPEC, chunk_key, chunk_kv, same
from ragcache.errors import StoreError
from ragcache.store import ChunkKey, DiskStore, Miss
from ragcache.store.disk import kv_shapes
from ragcache.store.format.header import Header
from ragcache.store.format.record import Record, encode_layers
from ragcache.store.remote.chunk_objects import ChunkObjects, encode_object, object_name
from ragcache.store.remote.object_store import Bucket, RetryPolicy
from ragcache.store.remote.store import RemoteStore
from ragcache.store.remote.sync import pull
from ragcache.types import ChunkKV

FULL, SHORT = 2000, 60  # objects
MOST_S, MOST_MIB = 5.0, 256  # for an object; that memory may grow by
VERSION = 7
_KNOWN = replace(MODEL, spec=SPEC)
_HASTY = RetryPolicy(first_s=0.001, longest_s=0.005, read_s=0.5, rest_s=0.05)
_CHUNKS = 12

Plant = Callable[[random.Random, ChunkKey, Path], None]


def run(rounds: int, seed: int) -> Outcome:
    rng, seen, slowest = random.Random(seed), Counter[str](), 0.0
    outcome, before = Outcome(f"{rounds} objects, {len(_PLANTS)} kinds"), _memory_mib()
    logging.getLogger("ragcache.store").setLevel(logging.ERROR)  # a warning for each object
    for turn in range(rounds):
        kind = list(_PLANTS)[turn % len(_PLANTS)]
        key = chunk_key(rng.randrange(_CHUNKS), _KNOWN)
        with scratch() as folder:
            file = folder / "remote" / object_name(key.content, key.digest)
            file.parent.mkdir(parents=True)
            _PLANTS[kind](rng, key, file)
            began = time.perf_counter()
            for what, verdict in (("get", _got(folder, key)), ("pull", _pulled(folder, key))):
                seen[f"{what} {verdict}"] += 1
                if verdict.startswith("WRONG"):
                    outcome.violations.append(f"{kind}: {what} {verdict}")
            taken = time.perf_counter() - began
        slowest = max(slowest, taken)
        if taken > MOST_S:
            outcome.violations.append(f"{kind}: not in time")
    if (grown := _memory_mib() - before) > MOST_MIB:
        outcome.violations.append(f"memory has grown by {grown:.0f} MiB")
    outcome.figures += [counts(seen), f"{slowest:.2f} s at most, {grown:.0f} MiB more memory"]
    return outcome


def _got(folder: Path, key: ChunkKey) -> str:
    objects = ChunkObjects(Bucket((folder / "remote").as_uri(), _HASTY))
    with RemoteStore(DiskStore(folder / "one"), objects, patience_s=5.0) as store:
        _know(store.disk)
        try:
            found = store.get(key)
        except Exception as error:
            return f"WRONG: {type(error).__name__}"
        store.flush()
        return _verdict(found, store.disk, key)


def _pulled(folder: Path, key: ChunkKey) -> str:
    with DiskStore(folder / "two") as disk:
        _know(disk)
        try:
            pull(disk, ChunkObjects(Bucket((folder / "remote").as_uri(), _HASTY)))
        except StoreError:
            return "StoreError"
        except Exception as error:
            return f"WRONG: {type(error).__name__}"
        return _verdict(disk.get(key), disk, key)


def _know(disk: DiskStore) -> None:
    """As a store is that was opened with the model."""
    with disk.tables.write() as txn:
        kv_shapes.record_shape(txn, _KNOWN)


def _verdict(found: ChunkKV | Miss, disk: DiskStore, key: ChunkKey) -> str:
    """What was served, and whether what is kept is in order."""
    if bad := disk.verify():
        return f"WRONG: kept, and {next(iter(bad.values()))}"
    if isinstance(found, Miss):
        return "WRONG: kept" if disk.has(key) else found.reason
    return "right" if same(found, chunk_kv(key.tokens, VERSION)) else "WRONG: KV that nobody put"


def _memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _object(
    key: ChunkKey, change: Callable[[ChunkKV], ChunkKV] = lambda kv: kv, codec: str = "raw"
) -> bytearray:
    """A record under a key with everything right but what ``change`` does, checksums too."""
    kv = change(chunk_kv(key.tokens, VERSION))
    header = replace(Header.of(key, kv, ()), codec=codec)
    _, data = encode_object(Record(header, tuple(encode_layers(codec, kv))))
    return bytearray(data)


def _whole(rng: random.Random, key: ChunkKey, file: Path) -> None:
    file.write_bytes(_object(key))


def _flipped(rng: random.Random, key: ChunkKey, file: Path) -> None:
    data = _object(key)
    for _ in range(rng.choice([1, 1, 1, 8, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _header(rng: random.Random, key: ChunkKey, file: Path) -> None:
    data = _object(key)
    at = rng.randrange(200)
    data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xF0000000]))
    file.write_bytes(data)
    os.truncate(file, rng.choice([len(data), 8 << 30]))  # sparse: it takes no room


def _cut(rng: random.Random, key: ChunkKey, file: Path) -> None:
    data = _object(key)
    file.write_bytes(data[: rng.randrange(len(data))])


def _another(rng: random.Random, key: ChunkKey, file: Path) -> None:
    file.write_bytes(_object(chunk_key(99, _KNOWN)))


def _codec(rng: random.Random, key: ChunkKey, file: Path) -> None:
    file.write_bytes(_object(key, codec=rng.choice(["int8", "bfloat16"])))


def fewer_layers(kv: ChunkKV) -> ChunkKV:
    """KV of a model with two layers."""
    return replace(kv, keys=kv.keys[:2], values=kv.values[:2])


def more_heads(kv: ChunkKV) -> ChunkKV:
    """KV with each head twice."""
    twice = [tuple(torch.cat([t, t]) for t in layers) for layers in (kv.keys, kv.values)]
    return replace(kv, keys=twice[0], values=twice[1])


def another_dtype(kv: ChunkKV) -> ChunkKV:
    """KV in float16."""
    halves = [tuple(t.half() for t in layers) for layers in (kv.keys, kv.values)]
    return replace(kv, keys=halves[0], values=halves[1])


def _shape(rng: random.Random, key: ChunkKey, file: Path) -> None:
    file.write_bytes(_object(key, rng.choice([fewer_layers, more_heads, another_dtype])))


def _not_finite(rng: random.Random, key: ChunkKey, file: Path) -> None:
    def change(kv: ChunkKV) -> ChunkKV:
        keys = [layer.clone() for layer in kv.keys]
        flat = rng.choice(keys).view(-1)
        flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), -float("inf")])
        return replace(kv, keys=tuple(keys))

    file.write_bytes(_object(key, change))


def _no_file(rng: random.Random, key: ChunkKey, file: Path) -> None:
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "circle": lambda: file.symlink_to(file),
        "device": lambda: file.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", "/dev/tty"])),
        "empty": file.touch,
        "noise": lambda: file.write_bytes(rng.randbytes(rng.randrange(20_000))),
    }
    make[rng.choice(list(make))]()


_PLANTS: dict[str, Plant] = {
    "as it was put": _whole,
    "flipped bits": _flipped,
    "numbers in the header": _header,
    "cut off": _cut,
    "another chunk's": _another,
    "another codec": _codec,
    "another shape or dtype": _shape,
    "not finite": _not_finite,
    "no file, or noise": _no_file,
}
