"""The index of the catalog's vectors, which is built anew when documents have changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Literal

from ragcache.errors import ConfigError
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex, VectorIndex
from ragcache.retriever.searched_catalog import SearchedCatalog

logger = logging.getLogger(__name__)

_KINDS: dict[str, type[VectorIndex]] = {"faiss": FaissIndex, "numpy": NumpyIndex}


class CurrentIndex:
    """An index of all vectors of a catalog, of ``dimension`` numbers made by ``embedder``, a name.

    The index saved at ``path`` is used if it is intact and of the catalog's generation. Otherwise
    it is built from the catalog's vectors, with the reason logged, and saved. Any number of threads
    may search while one refreshes: a new index replaces the old one, and no index is changed in
    place.

    ``may_save`` is called before each write: whether this process may write the file now.

    Raises ConfigError for an unknown kind, and if the catalog's vectors have another dimension.
    """

    def __init__(
        self,
        catalog: SearchedCatalog,
        dimension: int,
        path: Path,
        kind: Literal["faiss", "numpy"],
        *,
        embedder: str,
        may_save: Callable[[], bool],
    ):
        if kind not in _KINDS:
            raise ConfigError(f"index kind is {kind!r}: choose one of {', '.join(_KINDS)}")
        self.path = path
        self._catalog, self._dimension, self._embedder = catalog, dimension, embedder
        self._kind = _KINDS[kind]
        self._lock, self._may_save = Lock(), may_save
        generation = catalog.generation
        index, reason = self._kind.load(path, dimension=dimension, generation=generation)
        if index is None:
            logger.info("%s is rebuilt from the catalog: %s.", path, reason)
            generation, index = self._build()
        # One tuple, so that no thread sees an index with the generation of another one.
        self._current = (generation, index)
        if reason:
            self._save()

    @property
    def generation(self) -> int:
        """The catalog's generation from which the current index was built."""
        return self._current[0]

    def __len__(self) -> int:
        return len(self._current[1])

    def refresh(self) -> bool:
        """Rebuild and save the index if documents have changed; returns whether they had."""
        changed = self._refresh()
        if changed:
            self._save()
        return changed

    def current(self) -> VectorIndex:
        """The index of the catalog's generation, built now if documents have changed."""
        self._refresh()
        return self._current[1]

    def _refresh(self) -> bool:
        if self._current[0] == self._catalog.generation:
            return False
        with self._lock:
            if self._current[0] == self._catalog.generation:  # another thread was faster
                return False
            self._current = self._build()
        return True

    def _build(self) -> tuple[int, VectorIndex]:
        # The generation is read first: if the catalog changes in between, the index counts as older
        # than it is, and is built again.
        generation = self._catalog.generation
        ids, vectors = self._catalog.vectors()
        index = self._kind(self._dimension)
        if len(ids):
            if vectors.shape[1] != index.dimension:
                raise ConfigError(
                    f"The catalog's vectors have {vectors.shape[1]} dimensions, those of "
                    f"{self._embedder} {index.dimension}. Use the embedder that the documents "
                    "were indexed with, or index them again."
                )
            index.add(ids, vectors)
        return generation, index

    def _save(self) -> None:
        if not self._may_save():
            return
        generation, index = self._current
        try:
            index.save(self.path, generation)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the next start rebuilds it from the catalog.",
                *(self.path, error.strerror),
            )
