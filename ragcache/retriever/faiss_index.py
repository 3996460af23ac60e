"""A vector index by FAISS."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from ragcache.retriever.index import Ids, VectorIndex, Vectors, inner_products, top_k


class FaissIndex(VectorIndex):
    """Exact search by FAISS: ``IDMap2,Flat`` in its index factory, by inner product."""

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
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: ArrayLike) -> int:
        import faiss

        selector = faiss.IDSelectorBatch(np.asarray(ids, np.int64))
        return int(self._index.remove_ids(selector))

    def _search(self, query: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        import faiss

        # FAISS accumulates in float32 and does not define the order of ties. So more vectors are
        # fetched than requested, until rounding cannot bring any other one into the top k, and
        # those that were fetched are scored exactly.
        slack = 4 * self.dimension * float(np.finfo(np.float32).eps)
        searched, only = len(self), None
        if among is not None:
            searched = len(among)
            only = faiss.SearchParameters(sel=faiss.IDSelectorBatch(among))  # type: ignore[call-arg]
        fetch = min(k + 16, searched)
        while True:
            rough, ids = self._index.search(query[None], fetch, params=only)
            if fetch == searched or rough[0, -1] < rough[0, k - 1] - slack:
                break
            fetch = min(2 * fetch, searched)
        return top_k(inner_products(self._index.reconstruct_batch(ids[0]), query), ids[0], k)

    def _pack(self) -> bytes:
        import faiss

        return bytes(faiss.serialize_index(self._index).tobytes())

    @classmethod
    def _unpack(cls, payload: memoryview, dimension: int, count: int) -> Self | None:
        import faiss

        try:
            found = faiss.deserialize_index(np.frombuffer(payload, np.uint8))
        except RuntimeError:  # another version of FAISS may not know the payload's format
            return None
        expected = (dimension, count, faiss.METRIC_INNER_PRODUCT)
        if not isinstance(found, faiss.IndexIDMap2) or expected != (
            *(found.d, found.ntotal, found.metric_type),
        ):
            return None
        index = cls(dimension)
        index._index = found
        return index
