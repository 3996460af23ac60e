"""Build an approximate index from a catalog, and search it as widely as its recall needs."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from threading import Event

import numpy as np

from ragcache.errors import ConfigError
from ragcache.retriever.base_index import BaseIndex, digest, witness_rows
from ragcache.retriever.gpu_copy import gpu_copy
from ragcache.retriever.index import Ids, Vectors, checked
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
    measured on 256 of the vectors before they are added. Raises ConfigError where FAISS cannot
    build this kind of these vectors, ValueError for vectors that cannot be indexed, and
    BuildStopped after ``stop`` is set.
    """
    rows = catalog.rows()
    index = made(kind, dimension, len(rows))
    generator = np.random.default_rng(0)
    held, queries = _sample(catalog, dimension, rows, min(_QUERIES, len(rows) // 10), generator)
    sample = RecallSample(queries)
    witnesses, wanted = dict[int, int](), witness_rows(rows)
    added: list[Ids] = []
    try:
        if not index.is_trained:
            index.train(_sample(catalog, dimension, rows, _TRAINED_FROM, generator)[1])
        last = -1
        while len((block := catalog.vectors_after(last, _BLOCK))[0]):
            if stop is not None and stop.is_set():
                raise BuildStopped
            ids, vectors = block[0], checked(block[1], dimension)
            witnesses |= {
                row: digest(v)
                for row, v in zip(ids.tolist(), vectors, strict=True)
                if row in wanted
            }
            last, others = int(ids[-1]), ~np.isin(ids, held)
            index.add(vectors[others])
            sample.see(vectors[others])
            added.append(ids[others])
        order = np.concatenate([*added, np.empty(0, np.int64)])
        description = IndexDescription(kind, len(order), 0.0, floor, 1)
        base = BaseIndex(index, order, last + 1, description, witnesses)
        description = _widened(base, catalog, sample, floor, stop).description
        index.add(queries)
    except RuntimeError as error:
        raise ConfigError(
            f"index is {kind!r}, which FAISS cannot build of {len(rows):,} vectors "
            f"({faiss_reason(error)}): choose another kind, such as auto"
        ) from error
    order = np.concatenate([order, held])
    description = replace(description, vectors=len(order))
    return BaseIndex(index, order, last + 1, description, witnesses, gpu_copy(index))


def _sample(
    catalog: SearchedCatalog, dimension: int, rows: Ids, most: int, generator: np.random.Generator
) -> tuple[Ids, Vectors]:
    """Up to ``most`` of the rows, at random, and their vectors."""
    chosen = np.sort(generator.choice(rows, min(most, len(rows)), replace=False))
    blocks = (chosen[at : at + _BLOCK] for at in range(0, len(chosen), _BLOCK))
    parts = [found for block in blocks if len((found := vectors_there(catalog, block))[0])]
    ids = np.concatenate([np.empty(0, np.int64), *(part for part, _ in parts)])
    vectors = [checked(part, dimension) for _, part in parts]
    return ids, np.concatenate([np.empty((0, dimension), np.float32), *vectors])


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
            "than index_recall (%.1f %%): flat finds all.",
            *(base.kind, 100 * recall, 100 * floor),
        )
    return base.described(recall=recall, measured=time.time())
