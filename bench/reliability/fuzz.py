"""Fuzz the decoders of all records: damaged records must be rejected without an exception.

Headers, layers of every codec, and the catalog's checksummed records are flipped, truncated,
overwritten and spliced. A quarter of the headers and layers get a correct checksum again, to reach
the checks after it: they may be accepted if they are consistent, but must not raise.
"""

from __future__ import annotations

import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from bench.reliability.outcome import Outcome, counts
from bench.reliability.samples import DIM, HEADS, LAYERS, OTHER, chunk_key, chunk_kv
from ragcache.errors import StoreError
from ragcache.store import ChunkKey, Miss
from ragcache.store.format.checksummed import get_checksummed, put_checksummed
from ragcache.store.format.codecs import CODECS
from ragcache.store.format.codecs.basis import register_bases
from ragcache.store.format.codecs.kvtc import LEVELS
from ragcache.store.format.codecs.learn_basis import learn_basis
from ragcache.store.format.header import (
    Header,
    Payload,
    decode_header,
    decode_layer,
    encode_header,
    layer_checksum,
    payload_of,
)
from ragcache.store.format.record import encode_layers
from ragcache.store.lmdb.tables import MemoryTables
from ragcache.types import ChunkKV, Fingerprint

FULL, SHORT = 1_000_000, 5_000
Verdict = str


def damaged(record: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Not what it was, by one to three of five kinds of damage."""
    raw = record
    while raw == record or rng.random() < 0.3:
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(5)
        if kind == 0 and raw:
            at %= len(raw)
            raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at]
        elif kind == 2:
            noise = rng.randbytes(rng.randint(1, 16))
            raw = raw[:at] + noise + raw[at + len(noise) :]
        elif kind == 3:
            raw = raw[:at] + rng.choice(others)[rng.randrange(4) * 8 :]
        else:
            raw = raw[:at] + rng.choice([b"\0" * 8, b"\xff" * 4]) + raw[at:]
    return raw


def resealed(record: bytes) -> bytes:
    """A header whose size and checksum are right again."""
    body = record[:-8] if len(record) > 24 else record.ljust(24, b"\0")
    body = body[:12] + struct.pack("<I", len(body) + 8) + body[16:]
    return body + struct.pack("<Q", xxh3_64_intdigest(body))


class Headers:
    def __init__(self) -> None:
        keys = [chunk_key(0), chunk_key(4, OTHER), chunk_key(2)]
        keys.append(ChunkKey(OTHER, (7, 8, 9), (1, 2), "bos", "tenant"))
        self.records = [encode_header(header_of(key)) for key in keys]
        self.known = set(self.records)

    def __call__(self, rng: random.Random) -> Verdict:
        raw, sealed = damaged(rng.choice(self.records), self.records, rng), rng.random() < 0.25
        if sealed:
            raw = resealed(raw)
        found = decode_header(raw)
        if isinstance(found, Miss):
            return found.reason
        if raw in self.known:
            return "another record"
        if sealed:
            return "resealed" if encode_header(found) == raw else "WRONG: it says another thing"
        return "WRONG: accepted"


def header_of(key: ChunkKey) -> Header:
    payloads = []
    kv = chunk_kv(key.tokens, 1)
    for layer, (k, v) in enumerate(zip(kv.keys, kv.values, strict=True)):
        raw = CODECS[key.codec].encode(k, v, layer, len(kv.keys))
        payloads.append(Payload(0, len(raw), layer_checksum(key.digest, layer, raw)))
    return Header.of(key, kv, payloads)


class Layers:
    """Layers in these codecs. A layer of a codec that encodes several together is that of all."""

    def __init__(self, codecs: Iterable[str] = CODECS) -> None:
        self.whole: list[tuple[Header, int, bytes]] = []
        for number, name in enumerate(codecs):
            key = chunk_key(number % 2, Fingerprint((("weights", "a8b6"), ("codec", name))))
            kv = chunk_kv(key.tokens, 1)
            raws = [raw.tobytes() for raw in encode_layers(name, kv)]
            payloads = [
                Payload(
                    0, len(raw), layer_checksum(key.digest, layer, np.frombuffer(raw, np.uint8))
                )
                for layer, raw in enumerate(raws)
            ]
            header = Header.of(key, kv, payloads)
            for layer in range(len(raws)):
                self.whole.append((header, layer, raws[payload_of(header, layer)]))
        self.records = [raw for _, _, raw in self.whole]

    def __call__(self, rng: random.Random) -> Verdict:
        header, layer, whole = rng.choice(self.whole)
        raw = np.frombuffer(bytearray(damaged(whole, self.records, rng)), np.uint8)
        sealed = rng.random() < 0.25
        if sealed:
            payloads, at = list(header.payloads), payload_of(header, layer)
            payloads[at] = Payload(0, len(raw), layer_checksum(header.key, at, raw))
            header = replace(header, payloads=tuple(payloads))
        found = decode_layer(header, layer, raw)
        if isinstance(found, Miss):
            return found.reason
        shape = (header.spec.kv_heads, len(header.tokens), header.spec.head_dim)
        if any(t.shape != shape or t.dtype != torch.float32 for t in found):
            return "WRONG: KV of another shape"
        return "resealed" if sealed else "WRONG: accepted"


def with_basis(folder: Path) -> list[str]:
    """The codecs of a basis that is learned here, from KV of few components, and kept in
    ``folder``."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, LAYERS * 2 * HEADS * DIM, generator=generator)
    known = []
    for number in range(12):
        tokens = tuple(range(100 * number, 100 * number + 90))
        mixed = torch.randn(len(tokens), 4, generator=generator) @ mixing
        mixed += 0.1 * torch.randn(mixed.shape, generator=generator)
        planes = mixed.view(len(tokens), 2, LAYERS, HEADS, DIM).permute(1, 2, 3, 0, 4).contiguous()
        known.append(ChunkKV(tokens, tuple(planes[0]), tuple(planes[1])))
    basis = learn_basis("a8b6", [(1.0, 1.0)] * LAYERS, known[:8], known[8:])
    basis.write(folder)
    register_bases(folder)
    return [f"{level}:{basis.digest}" for level in LEVELS]


class Sealed:
    def __init__(self) -> None:
        self.tables = MemoryTables()
        self.rows = [(table, bytes([n]) * 8) for table in ("chunks", "vectors") for n in range(4)]
        with self.tables.write() as txn:
            for number, (table, key) in enumerate(self.rows):
                put_checksummed(txn, table, key, f'["document", {number}, "text", {{}}]'.encode())
        with self.tables.read() as txn:
            self.records = [txn.get(*row) or b"" for row in self.rows]

    def __call__(self, rng: random.Random) -> Verdict:
        number = rng.randrange(len(self.rows))
        table, key = self.rows[number]
        with self.tables.read() as txn:  # in place: a write would copy all tables
            txn.put(table, key, damaged(self.records[number], self.records, rng))
            try:
                get_checksummed(txn, table, key)
            except StoreError as error:
                return str(error.reason)
        return "WRONG: accepted"


def run(rounds: int, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        decoders: dict[str, Callable[[random.Random], Verdict]] = {
            "headers": Headers(),
            "layers": Layers(),
            "layers of kvtc": Layers(with_basis(Path(folder))),
            "sealed records": Sealed(),
        }
    seen = {name: Counter[str]() for name in decoders}
    outcome = Outcome(f"{rounds:,} records")
    rng = random.Random(seed)
    for turn in range(rounds):
        name = list(decoders)[turn % len(decoders)]
        try:
            verdict = decoders[name](rng)
        except Exception as error:
            verdict = f"WRONG: {type(error).__name__}: {error} (record {turn})"
        seen[name][verdict] += 1
    for name, verdicts in seen.items():
        outcome.figures.append(f"{name}: {counts(verdicts)}")
        for verdict, n in verdicts.items():
            if verdict.startswith("WRONG"):
                outcome.violations += n * [f"{name}: {verdict.removeprefix('WRONG: ')}"]
    return outcome
