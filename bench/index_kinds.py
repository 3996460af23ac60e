"""What each kind of vector index costs and finds, in stores of many vectors.

``python -m bench.index_kinds --vectors 200000 --page PAGE`` fills stores with vectors of 384
dimensions, of two sorts. Those that are *clustered* are drawn around 2,000 centres, with variances
that fall as 1/i over the directions, as those of the principal components of text embeddings do.
Those that are *random* have no structure at all: any two are almost orthogonal, and all are about
as far from a query, which is the worst case of approximate search. Queries are drawn in the same
way and are not stored. Each index is built in a process of its own by all cores, and searched by
one thread through LMDB, as a service does; the question's embedding is not included. Memory is what
an index takes that was opened from its file, without pages of files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np

from bench.results import begin_peak, commit, machine, table
from ragcache.retriever.current_index import CurrentIndex
from ragcache.retriever.index import Vectors
from ragcache.retriever.recall import NEAREST, RecallSample
from ragcache.store.catalog import chunks
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.store.lmdb.tables import set_counter
from ragcache.types import Chunk

DIMENSION = 384
CENTRES = 2000
QUERIES = 500
BLOCK = 20_000
SORTS = "clustered", "random"


def drawn(sort: str, n: int, seed: int) -> Iterator[Vectors]:
    """``n`` vectors of length 1, in blocks (b, 384)."""
    fall = np.arange(1, DIMENSION + 1, dtype=np.float32) ** -0.5
    fixed = np.random.default_rng(99)
    turned = np.linalg.qr(fixed.standard_normal((DIMENSION, DIMENSION), np.float32))[0]
    centres = fixed.standard_normal((CENTRES, DIMENSION), np.float32) * fall
    generator = np.random.default_rng(seed)
    for at in range(0, n, BLOCK):
        rows = generator.standard_normal((min(BLOCK, n - at), DIMENSION), np.float32)
        if sort == "clustered":
            rows = (centres[generator.integers(0, CENTRES, len(rows))] + rows * fall) @ turned
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill(store: DiskStore, sort: str, n: int, queries: Vectors) -> Vectors:
    """Store ``n`` vectors; the score of the tenth nearest of each query, (q,)."""
    exact = RecallSample(queries)
    for vectors in drawn(sort, n, 0):
        with store.tables.write() as txn:
            texts = [Chunk("d", number, "") for number in range(len(vectors))]
            chunks.add_rows(txn, texts, vectors)
            set_counter(txn, "generation", 1)
        exact.see(vectors)
    tenth: Vectors = exact.nearest.min(axis=1)
    return tenth


def anonymous_mib() -> float:
    """Memory of this process that is not of files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the system does not tell how much memory a process has")


def measure(folder: Path, kind: str) -> list[str]:
    """Build an index of a kind over a store that is filled, and search it: a row of the table."""
    found = np.load(folder / "queries.npz")
    queries, tenth = found["queries"], found["tenth"]
    path = folder / f"{kind}.index"
    with DiskStore(folder / "store") as store:
        catalog = Catalog(store)
        began = time.perf_counter()
        CurrentIndex(
            catalog, DIMENSION, path, kind, recall=0.98, embedder="", may_save=lambda: True
        )
        built_s = time.perf_counter() - began
        begin_peak()  # returns what is free to the system
        before, began = anonymous_mib(), time.perf_counter()
        current = CurrentIndex(  # from the file
            catalog, DIMENSION, path, kind, recall=0.98, embedder="", may_save=lambda: True
        )
        opened_s = time.perf_counter() - began
        index, said = current.current(), current.description
        faiss.omp_set_num_threads(1)
        times, shares = [], []
        for number, query in enumerate([*queries[:20], *queries]):  # the first 20 warm up
            began = time.perf_counter()
            scores, _ = index.search(query[None], NEAREST)
            times.append(1e3 * (time.perf_counter() - began))
            shares.append((scores[0] >= tenth[max(0, number - 20)] - 1e-5).mean())
        grown = anonymous_mib() - before
    p50, p99 = np.percentile(times[20:], [50, 99])
    width = "" if said.width is None else str(said.width)
    return [
        *(said.kind, f"{said.vectors:,}", f"{built_s:,.0f}", f"{opened_s:,.1f}"),
        *(f"{grown:,.0f}", f"{path.stat().st_size / 2**20:,.0f}", f"{p50:.2f}", f"{p99:.2f}"),
        *(width, f"{said.recall:.1%}", f"{np.mean(shares[20:]):.1%}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--sorts", nargs="+", default=SORTS, choices=SORTS)
    parser.add_argument("--kinds", nargs="+", default=["flat", "hnsw", "ivfpq"])
    parser.add_argument("--page", type=Path, help="append the table to this file, too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.kinds[0])))
        return
    heads = ["vectors", "kind", "n", "built in, s", "opened in, s", "memory, MiB", "file, MiB"]
    heads += ["p50, ms", "p99, ms", "width", "recall@10 as measured", "recall@10 of new queries"]
    rows = []
    for sort in given.sorts:
        with TemporaryDirectory() as made:
            folder = Path(made)
            queries = np.concatenate([*drawn(sort, QUERIES, 1)])
            with DiskStore(folder / "store") as store:
                tenth = fill(store, sort, given.vectors, queries)
            np.savez(folder / "queries.npz", queries=queries, tenth=tenth)
            for kind in given.kinds:
                command = [sys.executable, "-m", "bench.index_kinds", "--measure", made]
                done = subprocess.run(
                    [*command, "--kinds", kind], stdout=subprocess.PIPE, text=True, check=True
                )
                rows.append([sort, *json.loads(done.stdout)])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
                with suppress(FileNotFoundError):
                    (folder / f"{kind}.index").unlink()
    page = f"{table(heads, rows)}\n{DIMENSION} dimensions; {machine()}; commit {commit()}.\n"
    print(page)
    if given.page is not None:
        with given.page.open("a", encoding="utf-8") as file:
            file.write(page)


if __name__ == "__main__":
    main()
