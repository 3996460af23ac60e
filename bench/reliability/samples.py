"""Chunks whose KV identifies the write that it is from, so that reads can be checked."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ragcache.errors import StoreError
from ragcache.store import ChunkKey, DiskStore, Miss
from ragcache.store.format.header import Header, decode_header
from ragcache.types import ChunkKV, Fingerprint, KVSpec, Tokens

MODEL = Fingerprint((("weights", "a8b6"), ("dtype", "float32")), "tiny")
OTHER = Fingerprint((("weights", "9f11"), ("dtype", "float32")), "tiny")
LAYERS, HEADS, DIM = 3, 2, 8
SPEC = KVSpec(LAYERS, HEADS, DIM, "float32")
_TOKENS = (5, 40, 12, 300, 7, 100)  # of chunk 0, 1, ...: layers of 640 bytes to 38 KB


def chunk_key(number: int, model: Fingerprint = MODEL) -> ChunkKey:
    first = 1000 * number
    return ChunkKey(model, tuple(range(first, first + _TOKENS[number % len(_TOKENS)])))


def chunk_kv(tokens: Tokens, version: int) -> ChunkKV:
    """Random KV that ``version`` stands in; below 0, as encoded by an engine: not sensitive."""
    generator = torch.Generator().manual_seed(1_000_003 * abs(version) + tokens[0])
    both = torch.randn((2, LAYERS, HEADS, len(tokens), DIM), generator=generator)
    both[0, 0, 0, 0, 0] = version
    keys, values = both
    return ChunkKV(tokens, tuple(keys), tuple(values), (float(max(0, version)),) * len(tokens))


def put(store: DiskStore, number: int, version: int) -> None:
    key = chunk_key(number)
    store.put(key, chunk_kv(key.tokens, version))


def same(left: ChunkKV, right: ChunkKV) -> bool:
    """Whether two KVs are bit-identical."""
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    known = left.tokens, left.sensitivity
    return known == (right.tokens, right.sensitivity) and all(torch.equal(a, b) for a, b in pairs)


class Wrong(Exception):
    """KV was read that was never written."""


def version_of(found: ChunkKV) -> int:
    """Which put this is of, every bit of it. Raises Wrong where it is of none."""
    stamp = float(found.keys[0][0, 0, 0])
    if math.isfinite(stamp) and same(found, chunk_kv(found.tokens, round(stamp))):
        return round(stamp)
    raise Wrong(f"{len(found.tokens)} tokens from {found.tokens[0]} are of no put")


def served(store: DiskStore, number: int) -> int | None:
    """The version that is served, None where there is none. Raises Wrong, and for damage too."""
    found = store.get(chunk_key(number))
    if not isinstance(found, Miss):
        return version_of(found)
    if found.reason != "absent":
        raise Wrong(f"a chunk that nobody damaged is {found.reason}: {found.detail}")
    return None


def strays(store: DiskStore) -> list[str]:
    """Files in the folder of an open store that no store needs."""
    root = store.tables.path
    named = {store.tables.file, store.tables.file.with_name("lock.mdb")}
    named |= {root / "writer.lock", root / "CURRENT"}
    with store.tables.read() as txn:
        for _, record in txn.items("headers"):
            header = decode_header(record)
            if isinstance(header, Header) and header.file:
                named.add(root / "kv" / header.file[:2] / header.file)
    files = {path for path in root.rglob("*") if path.is_file()}
    return sorted(str(path.relative_to(root)) for path in files - named)


def unsound(path: Path, expected: dict[int, set[int | None]]) -> list[str]:
    """Open the store, and say what is not as it was acknowledged: chunk -> versions it may have.

    ``expected`` is narrowed down to what was found.
    """
    wrong = []
    try:
        with DiskStore(path) as store:
            wrong += [f"verify: {what}" for what in store.verify().values()]
            wrong += [f"left over: {_kind(name)}" for name in strays(store)]
            for number, may_be in expected.items():
                try:
                    version = served(store, number)
                except Wrong as error:
                    wrong.append(str(error))
                    continue
                if version not in may_be:
                    wrong.append(_difference(version, may_be))
                expected[number] = {version}
            with store.tables.read() as txn:
                headers = [decode_header(record) for _, record in txn.items("headers")]
            total = sum(header.payload_bytes for header in headers if isinstance(header, Header))
            if store.stats().payload_bytes != total:
                wrong.append("the totals are not those of the headers")
    except StoreError as error:
        wrong.append(f"cannot be opened: {error}".replace(str(path), "STORE"))
    return wrong


def _kind(name: str) -> str:
    if name.startswith("kv/"):
        return "an unfinished file" if name.endswith(".part") else "a file that no header names"
    return name


def _difference(version: int | None, may_be: set[int | None]) -> str:
    if version is None:
        return "an acknowledged chunk is lost"
    if may_be == {None}:
        return "an acknowledged delete is undone"
    return "an acknowledged put is undone, or a version is served that was not put yet"
