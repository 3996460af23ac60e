"""Flip one bit anywhere in a store: it must be detected or harmless, and never give wrong KV.

Header and layer records are changed through LMDB, everything else in its file. LMDB's own pages
have no checksum: a flip in them can show the store as of the previous commit (*older*) or crash the
process, so these stores are opened in a child process. KV, texts, documents and vectors have
checksums; counters, settings and tables that are derived from headers have none.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.reliability.child import Child
from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.patient import CHUNKS, EMBEDDER, NEWEST, TEXTS, fill, opened, served_all, use
from bench.reliability.samples import Wrong, chunk_key, put, version_of
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex, VectorIndex
from ragcache.retriever.search import Retriever
from ragcache.store import Catalog, DiskStore, Miss
from ragcache.store.disk.store import Layout
from ragcache.store.format.header import Header, decode_header
from ragcache.store.lmdb.tables import TABLES

FULL, SHORT = 2000, 60
_PAGE, _HEAD = 4096, 160  # bytes of a page of LMDB, and of it those that are mostly structure


def flipped(record: bytes, rng: random.Random, below: int | None = None) -> bytes:
    at = rng.randrange(below or len(record))
    return record[:at] + bytes([record[at] ^ 1 << rng.randrange(8)]) + record[at + 1 :]


@dataclass
class Bench:
    """An open store of either layout, and a closed one."""

    open: dict[Layout, DiskStore]
    closed: Path
    folder: Path  # for copies


@contextmanager
def prepared(folder: Path) -> Iterator[Bench]:
    layouts: tuple[Layout, ...] = ("records", "files")
    for layout in layouts:
        fill(folder / layout, layout)
    shutil.copytree(folder / "records", folder / "closed")
    stores = {layout: DiskStore(folder / layout, layout=layout) for layout in layouts}
    try:
        yield Bench(stores, folder / "closed", folder / "copy")
    finally:
        for store in stores.values():
            store.close()


def header_record(bench: Bench, rng: random.Random) -> str:
    layout = rng.choice(list(bench.open))
    return record(bench.open[layout], "headers", chunk_key(rng.randrange(CHUNKS)).digest, rng)


def layer_record(bench: Bench, rng: random.Random) -> str:
    digest = chunk_key(rng.randrange(CHUNKS)).digest
    return record(bench.open["records"], "layers", digest + bytes([0, rng.randrange(3)]), rng)


def record(store: DiskStore, table: str, row: bytes, rng: random.Random) -> str:
    number = next(n for n in range(CHUNKS) if chunk_key(n).digest == row[:32])
    with store.tables.write() as txn:
        whole = txn.get(table, row) or b""
        txn.put(table, row, flipped(whole, rng))
    return judged(store, number)


def chunk_file(bench: Bench, rng: random.Random) -> str:
    store, number = bench.open["files"], rng.randrange(CHUNKS)
    with store.tables.read() as txn:
        header = decode_header(txn.get("headers", chunk_key(number).digest) or b"")
    assert isinstance(header, Header)
    path = store.tables.path / "kv" / header.file[:2] / header.file
    path.write_bytes(flipped(path.read_bytes(), rng))
    return judged(store, number)


def judged(store: DiskStore, number: int) -> str:
    """What is served for the chunk, which is then put again; the others must be untouched."""
    before = sum(store.stats().misses.values())
    found = store.get(chunk_key(number))
    bad = store.verify()
    if isinstance(found, Miss):
        counted = sum(store.stats().misses.values()) - before == 1
        verdict = f"miss: {found.reason}" if counted else "WRONG: a miss that is not counted"
        if chunk_key(number).digest.hex() not in bad:
            verdict = "WRONG: a miss that verify does not name"
    else:
        verdict = "right" if version_of(found) == NEWEST else "WRONG: an older version"
    if len(bad) > 1 or served_all(store, {number}) != "right":
        verdict = "WRONG: another chunk is damaged"
    put(store, number, NEWEST)
    return verdict


def current(bench: Bench, rng: random.Random) -> str:
    """CURRENT of a store that was compacted. With CURRENT repaired, the store must be intact."""
    shutil.copytree(bench.closed, bench.folder)
    try:
        pointer = bench.folder / "CURRENT"
        right = pointer.read_bytes()
        pointer.write_bytes(flipped(right, rng))
        verdicts = [opened(bench.folder, readonly=True), opened(bench.folder)]
        pointer.write_bytes(right)
        repaired = opened(bench.folder)
        wrong = [verdict for verdict in verdicts if verdict not in ("right", "StoreError")]
        if repaired != "right":
            return f"WRONG: opened, {verdicts[1]}, and afterwards {repaired} for good"
        return f"WRONG: {wrong[0]} on opening" if wrong else verdicts[1]
    finally:
        shutil.rmtree(bench.folder)


def index_file(bench: Bench, rng: random.Random) -> str:
    """The file of a vector index, of either kind: after opening it, search finds the same."""
    kind = rng.choice([NumpyIndex, FaissIndex])
    name = "numpy" if kind is NumpyIndex else "flat"
    catalog = Catalog(bench.open["records"])
    path = bench.closed.parent / f"{name}.index"

    def open_index() -> Retriever:
        return Retriever(catalog, EMBEDDER, path, name)

    def found(retriever: Retriever) -> list[tuple[str, float]]:
        return [(p.chunk.id, p.score) for p in retriever.retrieve(TEXTS[3], 4)]

    right = found(open_index())
    path.write_bytes(flipped(path.read_bytes(), rng))
    index: VectorIndex | None = None
    index, reason = kind.load(path, dimension=32, generation=catalog.generation)
    if found(open_index()) != right or found(open_index()) != right:
        return "WRONG: it finds something else"
    return "right" if index is not None else f"rebuilt: {reason.partition(' it has ')[0]}"


def data_file(bench: Bench, rng: random.Random) -> str:
    """LMDB's file of a closed store: half of the flips anywhere, the others in the headers of its
    pages and in the record of each table (48 bytes after the name)."""
    shutil.copytree(bench.closed, bench.folder)
    try:
        with DiskStore(bench.folder, readonly=True) as store:
            path = store.tables.file
        raw = path.read_bytes()
        page = _PAGE * rng.randrange(len(raw) // _PAGE)
        name = rng.choice([*TABLES]).encode()
        table = raw.rfind(name) + len(name)
        anywhere = 0, len(raw)
        start, end = rng.choice([anywhere, anywhere, (page, page + _HEAD), (table, table + 48)])
        path.write_bytes(raw[:start] + flipped(raw[start:end], rng) + raw[end:])
        with Child(partial(use, bench.folder), quiet=True) as child:
            verdicts = child.read()
            status = child.wait()
        if status == -signal.SIGALRM:
            return "CRASH: it goes on for ever"
        if status < 0:
            return f"CRASH: {signal.Signals(-status).name}"
        worst = [v for v in verdicts if v.startswith("WRONG")]
        if status:
            return "WRONG: an exception that is no StoreError"
        return next(iter(worst or [v for v in verdicts if v != "right"]), "right")
    finally:
        shutil.rmtree(bench.folder)


TARGETS: dict[str, Callable[[Bench, random.Random], str]] = {
    "header records": header_record,
    "layer records": layer_record,
    "chunk files": chunk_file,
    "data.mdb": data_file,
    "CURRENT": current,
    "vector index files": index_file,
}


def run(rounds: int, seed: int) -> Outcome:
    seen: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    names = list(TARGETS)
    with scratch() as folder, prepared(folder) as bench:
        for turn in range(rounds):
            name = names[turn % len(names)]
            try:
                verdict = TARGETS[name](bench, random.Random(f"{seed}/{turn}"))
            except Wrong:
                verdict = "WRONG: KV that nobody put"
            seen[name][verdict] += 1
    outcome = Outcome(f"{rounds} flips")
    for name, verdicts in seen.items():
        outcome.figures.append(f"{name}: {counts(verdicts)}")
        for verdict, n in verdicts.items():
            if verdict.startswith("WRONG"):
                outcome.violations += n * [f"{name}: {verdict.removeprefix('WRONG: ')}"]
    crashes = sum(n for v, n in seen["data.mdb"].items() if v.startswith("CRASH"))
    outcome.figures.append(f"damaged data.mdb that ended its process: {crashes}")
    return outcome
