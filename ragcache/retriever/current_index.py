"""The index of the catalog's vectors, which follows the catalog when documents change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock, Thread

from ragcache.errors import ConfigError
from ragcache.retriever.approximate_index import ApproximateIndex, ExactBase
from ragcache.retriever.base_index import BaseIndex
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex, VectorIndex
from ragcache.retriever.index_build import BuildStopped, build
from ragcache.retriever.index_description import IndexDescription, describe_index
from ragcache.retriever.index_kind import EXACT, check_setting, chosen_kind
from ragcache.retriever.searched_catalog import SearchedCatalog

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0  # how long a build may take to stop
_KINDS: dict[str, type[VectorIndex]] = {"flat": FaissIndex, "numpy": NumpyIndex}


class CurrentIndex:
    """An index of all vectors of a catalog, of ``dimension`` numbers made by ``embedder``, a name.

    ``setting`` and the number of vectors choose its kind (:mod:`ragcache.retriever.index_kind`).
    The index saved at ``path`` is used if it is intact and of this catalog. Otherwise it is built
    from the catalog's vectors, with the reason logged, and saved.

    An exact index is built anew when documents have changed. An approximate one is searched with
    the rows that were added since; when a tenth of it is new or deleted, or another kind is due,
    the next one is built in a thread, while this one answers, and then saved. Its recall@10 is at
    least ``recall``, or a warning is logged.

    Any number of threads may search while one refreshes: a new index replaces the old one, and no
    index is changed in place. ``may_save`` is called before each write: whether this process may
    write the file now. :meth:`close` ends the thread.

    Raises ConfigError for a setting that is no kind of index, and if the catalog's vectors have
    another dimension.
    """

    def __init__(
        self,
        catalog: SearchedCatalog,
        dimension: int,
        path: Path,
        setting: str,
        *,
        recall: float,
        embedder: str,
        may_save: Callable[[], bool],
    ):
        check_setting(setting, dimension)
        self.path = path
        self._catalog, self._dimension, self._embedder = catalog, dimension, embedder
        self._setting, self._recall, self._may_save = setting, recall, may_save
        self._lock, self._saving, self._stop = Lock(), Lock(), Event()
        self._thread: Thread | None = None
        self._failed = False  # a build in the thread: the next process may try again
        saved = describe_index(path)
        kind = self._kind(saved.kind if saved else "")
        # One tuple, so that no thread sees an index with the generation of another one.
        self._current: tuple[int, VectorIndex | ApproximateIndex]
        generation = catalog.generation
        index, reason = self._load(kind, generation)
        if index is not None:
            self._current = generation, index
            self._renew(kind)
            return
        logger.info("%s is rebuilt from the catalog: %s.", path, reason)
        if kind in EXACT:
            self._current = self._built_exact(kind)
            self._save()
        else:
            base = self._built(kind)
            self._current = generation, ApproximateIndex.over(base, catalog, dimension)
            self._save_base(base, generation)

    @property
    def generation(self) -> int:
        """The catalog's generation that the current index is of."""
        return self._current[0]

    def __len__(self) -> int:
        return len(self._current[1])

    @property
    def description(self) -> IndexDescription:
        """The kind of the index that answers now, and its recall."""
        index = self._current[1]
        if isinstance(index, ApproximateIndex) and isinstance(index.base, BaseIndex):
            return index.base.description
        return IndexDescription(self._kind_of(index), len(index), 1.0)

    def refresh(self) -> bool:
        """Follow the catalog if documents have changed; returns whether they had. An exact index
        is saved; an approximate one was saved when it was built."""
        changed = self._refresh()
        if changed:
            self._save()
        return changed

    def current(self) -> VectorIndex | ApproximateIndex:
        """The index of the catalog's generation, after a refresh if documents have changed."""
        self._refresh()
        return self._current[1]

    @property
    def is_building(self) -> bool:
        """Whether the next approximate index is being built, or saved."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the index that is being built, if any, to be in use and saved."""
        if (thread := self._thread) is not None:
            thread.join()

    def close(self) -> None:
        """Stop a build; what FAISS trains cannot be stopped, and is waited for a moment only. The
        index can be searched as long as the catalog is open."""
        self._stop.set()
        if (thread := self._thread) is not None:
            thread.join(_PATIENCE_S)

    def _kind(self, now: str) -> str:
        return chosen_kind(self._setting, self._catalog.size[1], now)

    def _kind_of(self, index: VectorIndex | ApproximateIndex) -> str:
        if isinstance(index, ApproximateIndex):
            return index.base.kind
        return next(name for name, kind in _KINDS.items() if isinstance(index, kind))

    def _load(
        self, kind: str, generation: int
    ) -> tuple[VectorIndex | ApproximateIndex | None, str]:
        if kind in EXACT:
            return _KINDS[kind].load(self.path, dimension=self._dimension, generation=generation)
        base, reason = BaseIndex.load(self.path, self._catalog, self._dimension)
        if base is None:
            return None, reason
        return ApproximateIndex.over(base, self._catalog, self._dimension), ""

    def _refresh(self) -> bool:
        if self._current[0] == self._catalog.generation:
            return False
        with self._lock:
            # The generation is read first: if the catalog changes in between, the index counts as
            # older than it is, and is refreshed again.
            generation = self._catalog.generation
            before, index = self._current
            if before == generation:  # another thread was faster
                return False
            kind = self._kind(self._kind_of(index))
            if kind in EXACT:
                self._current = self._built_exact(kind)
                return True
            if isinstance(index, ApproximateIndex):
                index = index.extended()
            else:
                base = ExactBase(index, self._kind_of(index))
                index = ApproximateIndex.over(base, self._catalog, self._dimension)
            self._current = generation, index
        self._renew(kind)
        return True

    def _renew(self, kind: str) -> None:
        """Begin to build the next base if the current one is of another kind, or worn."""
        index = self._current[1]
        with self._lock:
            if not isinstance(index, ApproximateIndex) or self.is_building or self._failed:
                return
            if self._stop.is_set() or (index.base.kind == kind and not index.is_worn):
                return
            thread = Thread(target=self._build_next, args=(kind,), name="index", daemon=True)
            thread.start()
            self._thread = thread  # only now: one that has not begun cannot be waited for

    def _build_next(self, kind: str) -> None:
        import faiss

        faiss.omp_set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # of this thread only
        try:
            generation = self._catalog.generation
            base = self._built(kind)
            with self._lock:
                now = self._catalog.generation
                index = ApproximateIndex.over(base, self._catalog, self._dimension)
                self._current = now, index
            self._save_base(base, generation)
        except BuildStopped:
            pass
        except Exception as error:
            if self._stop.is_set():  # the catalog is closed, perhaps
                return
            self._failed = True
            logger.warning(
                "No %s index could be built (%s): the one from before answers, with the rows that "
                "were added since, until the next start.",
                *(kind, error),
            )

    def _built_exact(self, kind: str) -> tuple[int, VectorIndex]:
        generation = self._catalog.generation
        ids, vectors = self._catalog.vectors()
        index = _KINDS[kind](self._dimension)
        if len(ids):
            self._check_dimension(vectors.shape[1])
            index.add(ids, vectors)
        return generation, index

    def _built(self, kind: str) -> BaseIndex:
        _, vectors = self._catalog.vectors_after(-1, 1)
        if len(vectors):
            self._check_dimension(vectors.shape[1])
        return build(self._catalog, self._dimension, kind, self._recall, self._stop)

    def _check_dimension(self, dimension: int) -> None:
        if dimension != self._dimension:
            raise ConfigError(
                f"The catalog's vectors have {dimension} dimensions, those of {self._embedder} "
                f"{self._dimension}. Use the embedder that the documents were indexed with, or "
                "index them again."
            )

    def _save(self) -> None:
        generation, index = self._current
        if isinstance(index, VectorIndex):
            self._written(lambda: index.save(self.path, generation))

    def _save_base(self, base: BaseIndex, generation: int) -> None:
        self._written(lambda: base.save(self.path, generation))

    def _written(self, save: Callable[[], None]) -> None:
        if not self._may_save():
            return
        try:
            with self._saving:
                save()
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the next start rebuilds it from the catalog.",
                *(self.path, error.strerror or error),
            )
