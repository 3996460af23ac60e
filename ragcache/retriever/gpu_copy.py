"""Copies of FAISS indexes on a GPU, where FAISS was built for GPUs and sees one."""

from __future__ import annotations

import logging
from importlib import import_module
from threading import Lock
from typing import Any

from ragcache.retriever.index import Ids, Vectors

logger = logging.getLogger(__name__)

_MOST = 2048  # results, or lists, of one search that FAISS's kernels return or read at most


def gpus() -> int:
    """The number of GPUs that the installed FAISS can use; 0 if it was built for CPUs."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


class GpuCopy:
    """A FAISS index on the first GPU, searched instead of the one it was copied from."""

    def __init__(self, index: Any) -> None:
        faiss: Any = import_module("faiss")  # whose annotations lack what is for GPUs
        options = faiss.GpuClonerOptions()
        # Its lookup tables then fit for any number of parts. Other kinds keep their precision.
        options.useFloat16 = isinstance(index, faiss.IndexIVFPQ)
        self._memory = faiss.StandardGpuResources()  # lives as long as the index
        self._index = faiss.index_cpu_to_gpu(self._memory, 0, index, options)
        self._lock = Lock()  # an index on a GPU takes one search at a time

    def search(self, query: Vectors, k: int, nprobe: int = 0) -> tuple[Vectors, Ids]:
        """Scores and ids of the ``k`` nearest to a query (dimension,), as FAISS's search on the CPU
        returns them. ``nprobe``: inverted lists to read, for an index that has some."""
        import faiss

        params = faiss.SearchParametersIVF(nprobe=nprobe) if nprobe else None  # type: ignore[call-arg]
        with self._lock:
            scores, ids = self._index.search(query[None], k, params=params)
        return scores[0], ids[0]

    def takes(self, k: int, nprobe: int = 0) -> bool:
        """Whether it can search for so many."""
        return max(k, nprobe) <= _MOST


def gpu_copy(index: Any) -> GpuCopy | None:
    """A copy of a flat or IVF index on a GPU; None where there is none, or for another kind.

    Where a copy cannot be made, such as without enough memory, this is logged, and the CPU
    searches.
    """
    import faiss

    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    copied = faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer
    if not gpus() or not isinstance(inner, copied):
        return None
    try:
        return GpuCopy(index)
    except RuntimeError as error:
        logger.warning("The index cannot be copied to a GPU (%s): the CPU searches it.", error)
        return None
