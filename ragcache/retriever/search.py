"""Retrieve passages for a question: a vector index, kept up to date with the catalog."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np

from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.embed import Embedder, QuestionEmbedder
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import Ids, NumpyIndex, VectorIndex, Vectors
from ragcache.retriever.metadata import Filter, MetadataFilter, typed_metadata
from ragcache.types import Chunk, Passage

__all__ = ["Retriever"]

logger = logging.getLogger(__name__)

_KINDS: dict[str, type[VectorIndex]] = {"faiss": FaissIndex, "numpy": NumpyIndex}


class _Catalog(Protocol):
    """The catalog of chunks and vectors, as the retriever uses it. A row is a chunk's number."""

    @property
    def generation(self) -> int:
        """A number that grows with every change of chunks or vectors."""
        ...

    def vectors(self) -> tuple[Ids, Vectors]:
        """Rows (n,) and their normalised vectors (n, dimension)."""
        ...

    def chunk(self, row: int) -> Chunk:
        """The chunk of a row. Raises KeyError if it was deleted."""
        ...

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in document order; [] for an unknown document."""
        ...

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        """The metadata of every document, and the rows of its chunks."""
        ...


class Retriever:
    """Finds the chunks nearest to a question.

    The index saved at ``index_path`` is used if it is intact and of the catalog's generation.
    Otherwise it is built from the catalog's vectors, with the reason logged, and saved. Any number
    of threads may retrieve while one refreshes: a new index replaces the old one, and no index is
    changed in place.

    ``may_save`` is called before each write: whether this process may write the file now.

    Raises ConfigError for an unknown kind, and if the catalog's vectors have another dimension than
    the embedder's.
    """

    def __init__(
        self,
        catalog: _Catalog,
        embedder: Embedder,
        index_path: Path,
        kind: Literal["faiss", "numpy"] = "faiss",
        *,
        may_save: Callable[[], bool] = lambda: True,
    ):
        if kind not in _KINDS:
            raise ConfigError(f"index kind is {kind!r}: choose one of {', '.join(_KINDS)}")
        self.catalog = catalog
        self.embedder = embedder
        self.index_path = index_path
        self._kind = _KINDS[kind]
        self._lock, self._may_save = Lock(), may_save
        generation = catalog.generation
        index, reason = self._kind.load(
            index_path, dimension=embedder.dimension, generation=generation
        )
        if index is None:
            logger.info("%s is rebuilt from the catalog: %s.", index_path, reason)
            generation, index = self._build()
        # One tuple, so that no thread sees an index with the generation of another one.
        self._current = (generation, index)
        self._filters = _FilteredRows(catalog)
        if reason:
            self._save()

    @property
    def generation(self) -> int:
        """The catalog's generation from which the current index was built."""
        return self._current[0]

    def __len__(self) -> int:
        return len(self._current[1])

    def refresh(self) -> bool:
        """Rebuild and save the index if the catalog has changed; returns whether it had.

        Rebuilding an exact index takes about as long as reading the vectors. A file that cannot be
        written is logged and otherwise ignored: the next process rebuilds the index.
        """
        changed = self._refresh_index()
        if changed:
            self._save()
        return changed

    def retrieve(
        self,
        question: str,
        k: int,
        *,
        neighbours: int = 0,
        without: Iterable[str] = (),
        filter: Filter | None = None,
    ) -> list[Passage]:
        """The k chunks nearest to the question, and ``neighbours`` chunks before and after each.

        Documents are ordered by their best score, and the chunks of one document by their place in
        it, without duplicates: text that a chunk refers back to stands before it, as in the
        document. A hit has its own score; a neighbour has the best score of its hits.

        The index is refreshed first, so that replaced and deleted chunks are not found. Chunks of
        the documents ``without`` are excluded, and those whose documents a ``filter`` does not let
        pass, see :class:`~ragcache.retriever.metadata.MetadataFilter`. Returns [] if there is
        nothing to search. Raises PromptError for an empty question, and ConfigError for k < 1,
        neighbours < 0 or a filter that is none.
        """
        accepted = None if filter is None else MetadataFilter.of(filter)
        _check_k(k)
        if neighbours < 0:
            raise ConfigError(f"neighbours is {neighbours}: it must be 0 or more")
        if not question.strip():
            raise PromptError("The question is empty: there is nothing to search for.")
        self._refresh_index()
        _, index = self._current
        if not len(index):
            return []
        hidden = {row for document in without for row in self.catalog.rows_of(document)}
        among = None if accepted is None else self._filters.rows(accepted)
        scores, rows = index.search(self.embed_question(question)[None], k + len(hidden), among)
        found = zip(rows[0].tolist(), scores[0].tolist(), strict=True)  # best first
        hits = [(row, score) for row, score in found if row not in hidden]
        return self._arrange(dict(hits[:k]), neighbours)

    def ranked(
        self, question: str | Vectors, k: int, filter: Filter | None = None
    ) -> list[tuple[int, Passage]]:
        """Rows and passages of the k nearest chunks that a ``filter`` lets pass, nearest first,
        after a refresh.

        ``question`` may be a vector (dimension,) of length 1. Raises as :meth:`retrieve`.
        """
        _check_k(k)
        accepted = None if filter is None else MetadataFilter.of(filter)
        if isinstance(question, str):
            if not question.strip():
                raise PromptError("The question is empty: there is nothing to search for.")
            question = self.embed_question(question)
        self._refresh_index()
        _, index = self._current
        among = None if accepted is None else self._filters.rows(accepted)
        scores, rows = index.search(question[None], k, among)
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            with suppress(KeyError):  # deleted since the search
                found.append((row, Passage(self.catalog.chunk(row), score)))
        return found

    def _arrange(self, hits: dict[int, float], neighbours: int) -> list[Passage]:
        """Passages of the hits and their neighbours in reading order."""
        documents: dict[str, None] = {}  # in the order of their first, so best, hit
        chunks: dict[int, Chunk] = {}
        for row in hits:
            try:
                chunks[row] = self.catalog.chunk(row)
            except KeyError:  # deleted since the search
                continue
            documents.setdefault(chunks[row].document)
        passages = []
        for document in documents:
            rows = self.catalog.rows_of(document)
            scores: dict[int, float] = {}
            for at, row in enumerate(rows):
                around = rows[max(0, at - neighbours) : at + neighbours + 1]
                near = [hits[other] for other in around if other in hits]
                if near:
                    scores[row] = hits.get(row, max(near))
            for row, score in scores.items():
                try:
                    chunk = chunks.get(row) or self.catalog.chunk(row)
                except KeyError:
                    continue
                passages.append(Passage(chunk, score))
        return passages

    def embed_question(self, question: str) -> Vectors:
        """The query vector of a question, float32 (dimension,)."""
        if isinstance(self.embedder, QuestionEmbedder):
            return self.embedder.embed_question(question)
        vector: Vectors = self.embedder.embed([question])[0]
        return vector

    def _refresh_index(self) -> bool:
        if self._current[0] == self.catalog.generation:
            return False
        with self._lock:
            if self._current[0] == self.catalog.generation:  # another thread was faster
                return False
            self._current = self._build()
        return True

    def _build(self) -> tuple[int, VectorIndex]:
        # The generation is read first: if the catalog changes in between, the index counts as older
        # than it is, and is built again.
        generation = self.catalog.generation
        ids, vectors = self.catalog.vectors()
        index = self._kind(self.embedder.dimension)
        if len(ids):
            if vectors.shape[1] != index.dimension:
                raise ConfigError(
                    f"The catalog's vectors have {vectors.shape[1]} dimensions, those of "
                    f"{self.embedder.name} {index.dimension}. Use the embedder that the documents "
                    "were indexed with, or index them again."
                )
            index.add(ids, vectors)
        return generation, index

    def _save(self) -> None:
        if not self._may_save():
            return
        generation, index = self._current
        try:
            index.save(self.index_path, generation)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the next start rebuilds it from the catalog.",
                *(self.index_path, error.strerror),
            )


class _FilteredRows:
    """The rows that filters let pass, of the catalog's current generation.

    A search with a filter is then as exact as one without: the index searches these rows alone.
    """

    _MOST = 64  # filters whose rows are kept

    def __init__(self, catalog: _Catalog) -> None:
        self._catalog = catalog
        self._lock = Lock()
        self._generation = -1
        self._documents: list[tuple[dict[str, Any], range]] = []
        self._kept: dict[str, Ids] = {}  # the last used one last

    def rows(self, accepted: MetadataFilter) -> Ids:
        """Rows, ascending, of the chunks of all documents that a filter lets pass."""
        with self._lock:
            generation = self._catalog.generation
            if generation != self._generation:
                described = self._catalog.described()
                self._documents = [(typed_metadata(stored), rows) for stored, rows in described]
                self._generation, self._kept = generation, {}
            found = self._kept.pop(accepted.given, None)
            if found is None:
                passing = [rows for metadata, rows in self._documents if accepted.passes(metadata)]
                found = np.sort(np.fromiter(chain.from_iterable(passing), np.int64))
            self._kept[accepted.given] = found
            if len(self._kept) > self._MOST:
                del self._kept[next(iter(self._kept))]
            return found


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}: ask for at least 1 chunk")
