"""The kind of a vector index: chosen by the setting ``index`` and the number of vectors.

Exact kinds: ``flat`` (FAISS) and ``numpy``. Approximate kinds: ``hnsw``, a graph of near vectors,
each in half precision; ``ivfpq``, vectors in lists around centroids, quantised to a byte for every
eight numbers; and every other string that FAISS's index factory takes.
"""

from __future__ import annotations

import math
from typing import Any

from ragcache.errors import ConfigError

EXACT = "flat", "numpy"
_NAMED = *EXACT, "hnsw", "ivfpq"
_AUTO = {"flat": 200_000, "hnsw": 2_000_000, "ivfpq": math.inf}  # auto: kind -> most vectors
LEAST_APPROXIMATE = 10_000  # vectors: fewer are searched exactly in a millisecond


def chosen_kind(setting: str, vectors: int, now: str = "") -> str:
    """The kind for so many vectors: ``flat``, ``numpy``, ``hnsw``, ``ivfpq`` or a factory string.

    A setting of ``auto`` chooses by number, and no approximate index is made of less than 10,000
    vectors. A larger kind that is there ``now`` stays until half of its least number is left, so
    that a number that goes up and down does not have it built again and again.
    """
    if setting in EXACT:
        return setting
    if setting != "auto":
        least = LEAST_APPROXIMATE // 2 if now == setting else LEAST_APPROXIMATE
        return setting if vectors >= least else "flat"
    order = [*_AUTO]
    place = order.index(now) if now in order else 0
    kinds = (
        (kind, most / 2 if place > at else most) for at, (kind, most) in enumerate(_AUTO.items())
    )
    return next(kind for kind, most in kinds if vectors <= most)


def check_setting(setting: str, dimension: int) -> None:
    """Raise ConfigError for a setting that is no kind of index for vectors of this dimension."""
    if setting not in ("auto", *_NAMED):
        made(setting, dimension)


def made(kind: str, dimension: int, vectors: int = 0) -> Any:
    """An empty FAISS index of an approximate kind, for about so many vectors, searched by inner
    product. Raises ConfigError where there is none."""
    import faiss

    factory = _factory(kind, dimension, vectors)
    known = f"choose one of auto, {', '.join(_NAMED)}, or a string for FAISS's index factory"
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index is {kind!r}, of which FAISS makes no index of dimension {dimension} that is "
            f"searched by inner product ({faiss_reason(error)}): {known}"
        ) from error
    if isinstance(index, faiss.IndexIDMap) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ConfigError(
            f"index is {kind!r}, which keeps ids of its own or is not searched by inner product: "
            f"{known}"
        )
    return index


def faiss_reason(error: RuntimeError) -> str:
    """What an error of FAISS says, without the place in its code."""
    said = str(error)
    return said.rpartition(".cpp:")[2].partition(": ")[2] or said


def _factory(kind: str, dimension: int, vectors: int) -> str:
    if kind == "hnsw":
        return "HNSW32_SQfp16"
    if kind == "ivfpq":
        lists = min(16_384, 2 ** round(math.log2(4 * math.sqrt(max(1, vectors)))))
        part = next(numbers for numbers in range(8, 0, -1) if dimension % numbers == 0)
        return f"IVF{lists},PQ{dimension // part}np"  # no polysemous training, which is slow
    return kind
