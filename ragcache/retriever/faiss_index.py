"""A vector index by FAISS."""

from __future__ import annotations

from functools import cached_property
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from ragcache.retriever.faiss_stream import read_faiss, write_faiss
from ragcache.retriever.gpu_copy import GpuCopy, gpu_copy
from ragcache.retriever.index import Ids, VectorIndex, Vectors, inner_products, rounding, top_k
from ragcache.retriever.index_file import IndexHeader, UnusableFile


class FaissIndex(VectorIndex):
    """Exact search by FAISS: ``IDMap2,Flat`` in its index factory, by inner product.

    Where FAISS sees a GPU, it searches, unless a search is among some ids.
    """

    kind = 2

    def __init__(self, dimension: int):
        import faiss

        super().__init__(dimension)
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    @property
    def ids(self) -> Ids:
        import faiss

        return np.sort(faiss.vector_to_array(self._index.id_map))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def _add(self, ids: Ids, vectors: Vectors) -> None:
        self.__dict__.pop("_on_gpu", None)
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: ArrayLike) -> int:
        import faiss

        self.__dict__.pop("_on_gpu", None)
        selector = faiss.IDSelectorBatch(np.asarray(ids, np.int64))
        return int(self._index.remove_ids(selector))

    @cached_property
    def _on_gpu(self) -> GpuCopy | None:
        return gpu_copy(self._index)

    def _search(self, query: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        import faiss

        # FAISS accumulates in float32 and does not define the order of ties. So more vectors are
        # fetched than requested, until rounding cannot bring any other one into the top k, and
        # those that were fetched are scored exactly.
        slack = 2 * rounding(self.dimension)
        searched, only = len(self), None
        if among is not None:
            searched = len(among)
            only = faiss.SearchParameters(sel=faiss.IDSelectorBatch(among))  # type: ignore[call-arg]
        fetch = min(k + 16, searched)
        while True:
            if only is None and self._on_gpu is not None and self._on_gpu.takes(fetch):
                rough, ids = self._on_gpu.search(query, fetch)
            else:
                rough, ids = (a[0] for a in self._index.search(query[None], fetch, params=only))
            if fetch == searched or rough[-1] < rough[k - 1] - slack:
                break
            fetch = min(2 * fetch, searched)
        return top_k(inner_products(self._index.reconstruct_batch(ids), query), ids, k)

    def _write(self, file: BinaryIO) -> None:
        write_faiss(self._index, file)

    @classmethod
    def _read(cls, file: BinaryIO, header: IndexHeader) -> Self:
        import faiss

        found = read_faiss(file)
        expected = (header.dimension, header.vectors, faiss.METRIC_INNER_PRODUCT)
        if not isinstance(found, faiss.IndexIDMap2) or expected != (
            *(found.d, found.ntotal, found.metric_type),
        ):
            raise UnusableFile("its payload is not what it says")
        index = cls(header.dimension)
        index._index = found
        return index
