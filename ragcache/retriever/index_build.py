"""Build an approximate index from a catalog, and search it as widely as its recall needs."""

from __future__ import annotations

import logging
import time
from threading import Event

import numpy as np

from ragcache.errors import ConfigError
from ragcache.retriever.base_index import BaseIndex, digest, witness_rows
from ragcache.retriever.gpu_copy import gpu_copy
from ragcache.retriever.index import Ids, checked
from ragcache.retriever.index_description import IndexDescription
from ragcache.retriever.index_kind import faiss_reason, made
from ragcache.retriever.recall import RecallSample
from ragcache.retriever.searched_catalog import SearchedCatalog, vectors_there

logger = logging.getLogger(__name__)

_BLOCK = 4096  # rows read, and added, at once
_TRAINED_FROM = 200_000  # vectors at most
_QUERIES = 256  # vectors whose nearest are looked for to measure recall
_WIDEST = 64


class BuildStopped(Exception):
    """A build was stopped before it was done."""


def build(
    catalog: SearchedCatalog, dimension: int, kind: str, floor: float, stop: Event | None = None
) -> BaseIndex:
    """An index of all vectors of a catalog. Vectors are read in blocks, never all at once.

    The search becomes wider, twice as wide at a time, until recall@10 reaches ``floor``, as
    measured on 256 of the vectors. Raises ConfigError where FAISS cannot build this kind of these
    vectors, ValueError for vectors that cannot be indexed, and BuildStopped after ``stop`` is set.
    """
    rows = catalog.rows()
    index = made(kind, dimension, len(rows))
    generator = np.random.default_rng(0)
    sample = _sample(catalog, dimension, rows, _QUERIES, generator)
    witnesses, wanted = dict[int, int](), witness_rows(rows) if len(rows) else set()
    added: list[Ids] = []
    try:
        if not index.is_trained:
            index.train(_sample(catalog, dimension, rows, _TRAINED_FROM, generator).queries)
        last = -1
        while len((block := catalog.vectors_after(last, _BLOCK))[0]):
            if stop is not None and stop.is_set():
                raise BuildStopped
            ids, vectors = block[0], checked(block[1], dimension)
            index.add(vectors)
            sample.see(ids, vectors)
            witnesses |= {
                row: digest(v)
                for row, v in zip(ids.tolist(), vectors, strict=True)
                if row in wanted
            }
            added.append(ids)
            last = int(ids[-1])
    except RuntimeError as error:
        raise ConfigError(
            f"index is {kind!r}, which FAISS cannot build of {len(rows):,} vectors "
            f"({faiss_reason(error)}): choose another kind, such as auto"
        ) from error
    every = np.concatenate(added) if added else np.empty(0, np.int64)
    description = IndexDescription(kind, len(every), 0.0, floor, 1)
    base = BaseIndex(index, every, last + 1, description, witnesses, gpu_copy(index))
    return _widened(base, catalog, sample, floor, stop)


def _sample(
    catalog: SearchedCatalog, dimension: int, rows: Ids, most: int, generator: np.random.Generator
) -> RecallSample:
    chosen = np.sort(generator.choice(rows, min(most, len(rows)), replace=False))
    parts = [
        vectors_there(catalog, chosen[at : at + _BLOCK]) for at in range(0, len(chosen), _BLOCK)
    ]
    ids = np.concatenate([np.empty(0, np.int64), *(part for part, _ in parts)])
    vectors = [checked(part, dimension) for there, part in parts if len(there)]
    return RecallSample(ids, np.concatenate([np.empty((0, dimension), np.float32), *vectors]))


def _widened(
    base: BaseIndex,
    catalog: SearchedCatalog,
    sample: RecallSample,
    floor: float,
    stop: Event | None,
) -> BaseIndex:
    """The index with the least width that reaches the floor, or with the greatest."""
    width = 1
    while True:
        if stop is not None and stop.is_set():
            raise BuildStopped
        base = base.described(width=width)
        recall = sample.recall(catalog, base.candidates)
        if recall >= floor or width >= _WIDEST:
            break
        width *= 2
    if recall < floor:
        logger.warning(
            "The index %s finds %.1f %% of the nearest vectors however widely it is searched, less "
            "than index_recall (%.1f %%): choose another kind, such as flat or hnsw.",
            *(base.kind, 100 * recall, 100 * floor),
        )
    return base.described(recall=recall, measured=time.time())
