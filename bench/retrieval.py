"""How well the chunks are found that answer a question: by vectors, by words and by both.

``python -m bench.retrieval FILE... --page PAGE`` puts all paragraphs of the given files, in
CacheBlend's format, each once, into one index, and asks all questions that say which of their
paragraphs support the answer (``supporting``). Printed are, with 95 % intervals over questions,
recall@10, the share of these paragraphs among the first ten, and nDCG@10, and the time of a search,
in which embedding the question is included.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from bench.results import commit, machine, table
from ragcache.eval.bootstrap import Array, Bootstrap
from ragcache.retriever.bm25 import BM25Index
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.retriever.index import Ids, Vectors
from ragcache.retriever.search import Retriever
from ragcache.retriever.search_options import RETRIEVALS, Retrieval
from ragcache.types import Chunk

TOP = 10
VARIANTS: Mapping[str, tuple[Retrieval, float | None]] = {
    **{name: (name, None) for name in RETRIEVALS},
    "dense, mmr 0.7": ("dense", 0.7),
}


@dataclass(frozen=True)
class Asked:
    """A question, and the ids of the paragraphs that support its answer."""

    text: str
    right: frozenset[str]


class Paragraphs:
    """A catalog of paragraphs, each a document of one chunk."""

    generation = 1

    def __init__(self, texts: Sequence[str], embedder: Embedder) -> None:
        self.texts = texts
        self.next_row, self.size = len(texts), (len(texts), len(texts))
        self._vectors = embedder.embed(texts)

    def vectors(self) -> tuple[Ids, Vectors]:
        return np.arange(len(self.texts)), self._vectors

    def vectors_after(self, row: int, most: int) -> tuple[Ids, Vectors]:
        rows = np.arange(row + 1, min(self.next_row, row + 1 + most))
        return rows, self._vectors[rows]

    def rows(self) -> Ids:
        return np.arange(self.next_row)

    def vectors_of(self, rows: Sequence[int]) -> Vectors:
        return self._vectors[np.asarray(rows, np.int64)]

    def chunk(self, row: int) -> Chunk:
        return Chunk(str(row), 0, self.texts[row])

    def rows_of(self, document_id: str) -> list[int]:
        return [int(document_id)]

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        rows = range(after + 1, min(len(self.texts), after + 1 + most))
        return [(row, self.chunk(row)) for row in rows]

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        return [({}, range(row, row + 1)) for row in range(len(self.texts))]


def read(files: Sequence[Path]) -> tuple[list[str], list[Asked]]:
    """All paragraphs, each once, and all questions that say what supports their answers."""
    rows: dict[str, int] = {}
    asked: list[Asked] = []
    for file in files:
        for record in json.loads(file.read_text(encoding="utf-8")):
            right = set()
            for paragraph in record["ctxs"]:
                text = f"{paragraph['title']}\n{paragraph['text']}"
                row = rows.setdefault(text, len(rows))
                if paragraph["title"] in record.get("supporting", ()):
                    right.add(str(row))
            if right:
                asked.append(Asked(record["question"], frozenset(right)))
    return [*rows], asked


def measures(found: Sequence[str], right: frozenset[str]) -> tuple[float, float]:
    """Recall and normalised discounted cumulative gain (Jarvelin and Kekalainen, 2002) of what was
    found, best first, with relevance 1 for what is right."""
    gains = [1 / math.log2(rank + 2) for rank, one in enumerate(found) if one in right]
    best = sum(1 / math.log2(rank + 2) for rank in range(min(len(right), TOP)))
    return len(gains) / len(right), sum(gains) / best


def measure(retriever: Retriever, asked: Sequence[Asked], variant: str) -> list[str]:
    """A row of the table: recall@10, nDCG@10, and milliseconds."""
    retrieval, mmr = VARIANTS[variant]
    retriever.retrieve(asked[0].text, TOP, retrieval=retrieval)  # makes the index of words
    totals, times = [], []
    for question in asked:
        began = time.perf_counter()
        passages = retriever.retrieve(question.text, TOP, retrieval=retrieval, mmr=mmr)
        times.append(time.perf_counter() - began)
        totals.append([1.0, *measures([p.chunk.document for p in passages], question.right)])
    shown = [
        f"{e.value:.1%}"
        + ("" if e.interval is None else f" [{e.interval[0]:.1%}, {e.interval[1]:.1%}]")
        for e in Bootstrap(np.array(totals)).estimate(_means)
    ]
    return [variant, *shown, f"{median(times) * 1e3:.1f}"]


def _means(sums: Array) -> Array:
    means: Array = sums[..., 1:] / sums[..., :1]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="write the table here, too")
    given = parser.parse_args()
    texts, asked = read(given.files)
    embedder = SentenceTransformerEmbedder(device="cpu")
    with TemporaryDirectory() as folder:
        retriever = Retriever(Paragraphs(texts, embedder), embedder, Path(folder) / "vectors")
        rows = [measure(retriever, asked, variant) for variant in VARIANTS]
    began = time.perf_counter()
    BM25Index(range(len(texts)), texts)
    made_s = time.perf_counter() - began
    page = (
        table(["retrieval", f"recall@{TOP}", f"nDCG@{TOP}", "ms a search"], rows)
        + f"\n{len(texts):,} paragraphs, {len(asked)} questions, {embedder.name}; {machine()}; "
        f"commit {commit()}. The index of their words is made in {made_s:.2f} s.\n"
    )
    print(page)
    if given.page is not None:
        given.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
