"""Questions to passages: the index next to the catalog that it is made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import numpy as np

from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.embed import Embedder, QuestionEmbedder
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import Ids, NumpyIndex, VectorIndex, Vectors
from ragcache.types import Chunk, Passage

logger = logging.getLogger(__name__)

_KINDS: dict[str, type[VectorIndex]] = {"faiss": FaissIndex, "numpy": NumpyIndex}


class _Catalog(Protocol):
    """What the retriever asks of the keeper of chunks and vectors. A row is a chunk's number."""

    @property
    def generation(self) -> int:
        """Grows with every change of chunks or vectors."""
        ...

    def vectors(self) -> tuple[Ids, Vectors]:
        """Rows (n,) and their vectors (n, dimension), normalised."""
        ...

    def chunk(self, row: int) -> Chunk:
        """The chunk of a row. Raises KeyError for a row that is gone."""
        ...

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in document order; [] where it is gone."""
        ...


class Retriever:
    """Finds the chunks nearest to a question.

    Opening takes the index saved at ``index_path`` if it is whole and of the catalog's generation,
    and else builds it from the catalog's vectors, logs why, and saves it. Any number of threads
    may retrieve while one refreshes: a new index replaces the old one, none is changed in place.

    ``may_save``: whether this process may write the file now; asked each time before it does.

    Raises ConfigError for an unknown kind, and where the catalog's vectors are not as long as the
    embedder's.
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
        # The index and what it was made from change together, so that no thread sees one of each.
        self._current = (generation, index)
        if reason:
            self._save()

    @property
    def generation(self) -> int:
        """Generation of the catalog that the index in use was made from."""
        return self._current[0]

    def __len__(self) -> int:
        return len(self._current[1])

    def refresh(self) -> bool:
        """Bring the index up to the catalog's generation and save it; False if it was there.

        The index is exact and has no structure to keep: it is built anew, which takes about as
        long as reading the vectors. A file that cannot be written is logged, for the next to open
        the catalog can do without it.
        """
        changed = self._catch_up()
        if changed:
            self._save()
        return changed

    def retrieve(
        self, question: str, k: int, *, neighbours: int = 0, without: Iterable[str] = ()
    ) -> list[Passage]:
        """The k chunks nearest to the question, and ``neighbours`` chunks before and after each.

        Documents come in the order of their best score, and the chunks of one document together,
        in document order, none twice: so what a chunk refers back to stands before it, as it did
        in the document, and KV that attends to earlier chunks finds them there. A neighbour has
        the score of its hit, the best of them if there are several; a hit has its own.

        The index is brought up to the catalog first, so that a chunk that was replaced or deleted
        is not found; nor are those of the documents ``without``. [] where there is nothing to
        search. Raises PromptError for an empty question, ConfigError for k < 1 or neighbours < 0.
        """
        _check_k(k)
        if neighbours < 0:
            raise ConfigError(f"neighbours is {neighbours}: it must be 0 or more")
        if not question.strip():
            raise PromptError("The question is empty: there is nothing to search for.")
        self._catch_up()
        _, index = self._current
        if not len(index):
            return []
        hidden = {row for document in without for row in self.catalog.rows_of(document)}
        scores, rows = index.search(self.embed_question(question)[None], k + len(hidden))
        found = zip(rows[0].tolist(), scores[0].tolist(), strict=True)  # best first
        hits = [(row, score) for row, score in found if row not in hidden]
        return self._arrange(dict(hits[:k]), neighbours)

    def ranked(self, question: str | Vectors, k: int) -> list[tuple[int, Passage]]:
        """Rows and passages of the k nearest chunks, the nearest first, up to date as above.

        ``question`` may be a vector, (dimension,), of length 1. Raises as :meth:`retrieve`.
        """
        _check_k(k)
        if isinstance(question, str):
            if not question.strip():
                raise PromptError("The question is empty: there is nothing to search for.")
            question = self.embed_question(question)
        self._catch_up()
        _, index = self._current
        scores, rows = index.search(question[None], k)
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            with suppress(KeyError):  # went since the search
                found.append((row, Passage(self.catalog.chunk(row), score)))
        return found

    def similar(self, chunk: Chunk, k: int) -> list[Chunk]:
        """The k chunks most similar to ``chunk``, without itself, the most similar first."""
        self._catch_up()
        _, index = self._current
        if not len(index):
            return []
        _, rows = index.search(self.embedder.embed([chunk.text]), k + 1)
        found = []
        for row in rows[0].tolist():
            try:
                found.append(self.catalog.chunk(row))
            except KeyError:  # went since the search, or fewer than k + 1
                continue
        return [other for other in found if other.id != chunk.id][:k]

    def _arrange(self, hits: dict[int, float], neighbours: int) -> list[Passage]:
        """Passages of the hits and their neighbours in reading order."""
        documents: dict[str, None] = {}  # in the order of their first, so best, hit
        chunks: dict[int, Chunk] = {}
        for row in hits:
            try:
                chunks[row] = self.catalog.chunk(row)
            except KeyError:  # went since the search
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
        """The vector to search with, (dimension,)."""
        if isinstance(self.embedder, QuestionEmbedder):
            return self.embedder.embed_question(question)
        vector: Vectors = self.embedder.embed([question])[0]
        return vector

    def _catch_up(self) -> bool:
        if self._current[0] == self.catalog.generation:
            return False
        with self._lock:
            if self._current[0] == self.catalog.generation:  # another thread was faster
                return False
            self._current = self._build()
        return True

    def _build(self) -> tuple[int, VectorIndex]:
        # The generation is read first: should the catalog change in between, the index is taken
        # for older than it is, and built again.
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


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}: ask for at least 1 chunk")


def nearest(embedder: Embedder, texts: Sequence[str], k: int) -> list[list[int]]:
    """Of every text the k others that are most similar, the most similar first."""
    vectors = embedder.embed(texts)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    return [row[: min(k, len(texts) - 1)].tolist() for row in order]
