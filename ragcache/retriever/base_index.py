"""An approximate index by FAISS of the rows that a catalog had at one time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from ragcache.errors import StoreError
from ragcache.retriever.faiss_stream import read_faiss, write_faiss
from ragcache.retriever.gpu_copy import GpuCopy, gpu_copy
from ragcache.retriever.index import Ids, Vectors, check_kind, rounding
from ragcache.retriever.index_description import (
    APPROXIMATE,
    IndexDescription,
    read_notes,
    write_notes,
)
from ragcache.retriever.index_file import IndexHeader, UnusableFile, opened, write
from ragcache.retriever.searched_catalog import SearchedCatalog

_WITNESSES = 256
_EF, _LISTS, _CANDIDATES = 32, 8, 16  # per width


@dataclass(frozen=True)
class BaseIndex:
    """Finds rows whose vectors are near a query's. It does not know which were deleted since.

    ``index`` is FAISS's, whose ids are places in ``order``, the rows (n,) as they were added.
    ``end``: the first row that it does not know.
    """

    index: Any
    order: Ids
    end: int
    description: IndexDescription
    witnesses: Mapping[int, int] = field(repr=False)  # row -> xxh3_64 of its vector
    on_gpu: GpuCopy | None = None

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def rows(self) -> Ids:
        """Ascending, (n,)."""
        return self.order[self._places]

    @cached_property
    def _places(self) -> Ids:
        """Of the rows, ascending."""
        return np.argsort(self.order)

    @property
    def kind(self) -> str:
        return self.description.kind

    def described(self, **changes: Any) -> Self:
        """This index with another description."""
        return replace(self, description=replace(self.description, **changes))

    def fetched(self, k: int, times: int = 1) -> int:
        """How many candidates :meth:`candidates` looks for."""
        return min(len(self), times * (k + _CANDIDATES * self._width))

    def candidates(self, query: Vectors, k: int, times: int = 1) -> Ids:
        """Rows that the ``k`` nearest to a query (dimension,) are likely among, best first by
        approximate scores. ``times``: search so many times wider than the description says."""
        fetch, width = self.fetched(k, times), times * self._width
        probes = _probes(self.index, width)
        if self.on_gpu is not None and self.on_gpu.takes(fetch, probes):
            _, places = self.on_gpu.search(query, fetch, probes)
        else:
            parameters = _parameters(self.index, width)
            places = self.index.search(query[None], fetch, params=parameters)[1][0]
        found: Ids = self.order[places[places >= 0]]  # -1: there were no more
        return found

    @cached_property
    def error(self) -> float | None:
        """The most by which scores of :meth:`rough` differ from the exact ones; None if the index
        does not have the vectors precisely enough."""
        faiss: Any = import_module("faiss")
        stored = self._stored
        if isinstance(stored, faiss.IndexFlat):
            return rounding(stored.d)
        if isinstance(stored, faiss.IndexScalarQuantizer):
            if stored.sq.qtype == faiss.ScalarQuantizer.QT_fp16:  # 11 significant bits
                return 2.0**-11 + rounding(stored.d)
        return None

    def rough(self, query: Vectors, k: int, among: Ids) -> tuple[Vectors, Ids]:
        """Scores and rows of the ``k`` nearest of some of these rows, best first, all of which are
        compared. Only where there is an :attr:`error`."""
        faiss: Any = import_module("faiss")
        chosen = np.zeros(len(self), bool)
        chosen[self._places[np.searchsorted(self.rows, among)]] = True
        selector = faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        only = faiss.SearchParameters(sel=selector)
        scores, places = self._stored.search(query[None], min(k, len(among)), params=only)
        return scores[0], self.order[places[0]]

    @property
    def _stored(self) -> Any:
        """The vectors within the index, as an index; None for other kinds."""
        import faiss

        is_graph = isinstance(self.index, faiss.IndexHNSW)
        return faiss.downcast_index(self.index.storage) if is_graph else None

    @property
    def _width(self) -> int:
        return self.description.width or 1

    def save(self, path: Path, generation: int) -> None:
        """As :meth:`~ragcache.retriever.index.VectorIndex.save`."""
        header = IndexHeader(APPROXIMATE, self.index.d, generation, len(self))
        write(path, header, self._write)

    def _write(self, file: BinaryIO) -> None:
        write_notes(file, self.description, end=self.end, witnesses=[*self.witnesses.items()])
        file.write(self.order.astype("<i8").tobytes())
        write_faiss(self.index, file)

    @classmethod
    def load(cls, path: Path, catalog: SearchedCatalog, dimension: int) -> tuple[Self | None, str]:
        """The saved index and "", or None and the reason why the file cannot be used.

        An index of an earlier generation of the same catalog can be used. It is of the same catalog
        if the rows that it has noted as witnesses, as far as they are still there, have the vectors
        that they had: no row is used twice.
        """
        try:
            with opened(path) as (header, file):
                check_kind(header, APPROXIMATE, dimension)
                description, notes = read_notes(file)
                order = np.fromfile(file, "<i8", header.vectors).astype(np.int64, copy=False)
                index = read_faiss(file)
        except UnusableFile as error:
            return None, str(error)
        if (index.d, index.ntotal, len(order)) != (dimension, header.vectors, header.vectors):
            return None, "its payload is not what it says"
        made = cls(
            index, order, notes["end"], description, dict(notes["witnesses"]), gpu_copy(index)
        )
        if header.generation > catalog.generation or made.end > catalog.next_row:
            return None, "it is of a later generation than the catalog"
        return (made, "") if made._is_of(catalog) else (None, "it is of another catalog")

    def _is_of(self, catalog: SearchedCatalog) -> bool:
        same = []
        for row, expected in self.witnesses.items():
            with suppress(KeyError, StoreError):  # deleted, or damaged
                same.append(digest(catalog.vectors_of([row])[0]) == expected)
        return bool(same) and all(same)


def witness_rows(rows: Ids) -> set[int]:
    """Rows spread evenly over all, among them the last."""
    if not len(rows):
        return set()
    places = np.linspace(0, len(rows) - 1, min(len(rows), _WITNESSES)).round().astype(np.int64)
    return set(rows[places].tolist())


def digest(vector: Vectors) -> int:
    """The xxh3_64 of a vector's bytes."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(vector.astype("<f4").tobytes())


def _probes(index: Any, width: int) -> int:
    """The inverted lists to read; 0 for an index that has none itself."""
    import faiss

    return min(index.nlist, _LISTS * width) if isinstance(index, faiss.IndexIVF) else 0


def _parameters(index: Any, width: int) -> Any:
    """FAISS's parameters of a search of this width; None where the kind has none."""
    faiss: Any = import_module("faiss")  # whose annotations lack the names of parameters

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, width)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, width)
        return faiss.IndexRefineSearchParameters(k_factor=4, base_index_params=inner)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=_EF * width)
    if isinstance(index, faiss.IndexIVFPQ):
        return faiss.IVFPQSearchParameters(nprobe=_probes(index, width))
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=_probes(index, width))
    return None
