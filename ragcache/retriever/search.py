"""Retrieve passages for a question: by vectors, by words or by both, and by metadata, over indexes
that are kept up to date with the catalog."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack

import numpy as np

from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.bm25 import BM25Index, check_installed
from ragcache.retriever.embed import Embedder, QuestionEmbedder
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import Ids, NumpyIndex, VectorIndex, Vectors, inner_products
from ragcache.retriever.metadata import Filter, MetadataFilter, typed_metadata
from ragcache.types import Chunk, Passage

__all__ = ["Retrieval", "Retriever", "SearchOptions"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: What chunks are found by: the similarity of vectors, the words that they share with the question,
#: or both, each giving every chunk its rank.
Retrieval = Literal["dense", "bm25", "hybrid"]
RETRIEVALS: tuple[Retrieval, ...] = "dense", "bm25", "hybrid"

#: Of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): the rank that counts half.
_RRF = 60

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

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        """Up to ``most`` rows after row ``after`` with their chunks, ascending."""
        ...

    def vectors_of(self, rows: Sequence[int]) -> Vectors:
        """The vectors of rows, in the order given. Raises KeyError for one that is gone."""
        ...

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        """The metadata of every document, and the rows of its chunks."""
        ...


class _SearchOptions(TypedDict, total=False):
    """Fields of :class:`SearchOptions`."""

    neighbours: int
    retrieval: Retrieval
    filter: Filter | None
    min_score: float | None
    mmr: float | None
    without: Iterable[str]


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What to retrieve for a question. Raises ConfigError for values out of their range."""

    k: int  # chunks
    neighbours: int = 0  # chunks before and after each of them
    retrieval: Retrieval = "dense"
    #: The metadata of the documents to search, see
    #: :class:`~ragcache.retriever.metadata.MetadataFilter`. None: all documents.
    filter: Filter | None = None
    #: The least cosine similarity of a chunk with the question, in [-1, 1]; neighbours may have
    #: less. None: any.
    min_score: float | None = None
    #: Choose among the most similar chunks by maximal marginal relevance: 1 for the similarity to
    #: the question alone, 0 for chunks that are unlike one another. None: all that are similar.
    mmr: float | None = None
    without: Iterable[str] = ()  # documents to leave out

    def __post_init__(self) -> None:
        _check_k(self.k)
        if self.neighbours < 0:
            raise ConfigError(f"neighbours is {self.neighbours}: it must be 0 or more")
        if self.retrieval not in RETRIEVALS:
            raise ConfigError(
                f"retrieval is {self.retrieval!r}: choose one of {', '.join(RETRIEVALS)}"
            )
        for name, least in (("min_score", -1), ("mmr", 0)):
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (fits and least <= value <= 1):
                raise ConfigError(f"{name} is {value!r}: it is a number from {least} to 1")

    @property
    def selects(self) -> bool:
        """Whether chunks are selected among those that were found."""
        return self.min_score is not None or self.mmr is not None

    @property
    def depth(self) -> int:
        """How many chunks each index is asked for."""
        if self.retrieval == "dense" and self.mmr is None:
            return self.k
        return max(50, 4 * self.k)


def fused_ranks(found: Sequence[Sequence[int]]) -> list[int]:
    """The rows of several rankings, each best first, by the sum of 1 / (60 + rank) over them; of
    ties the smaller row first. One ranking is left as it is."""
    if len(found) == 1:
        return list(found[0])
    values: dict[int, float] = {}
    for rows in found:
        for rank, row in enumerate(rows, 1):
            values[row] = values.get(row, 0.0) + 1 / (_RRF + rank)
    return sorted(values, key=lambda row: (-values[row], row))


def most_relevant_and_unlike(
    vectors: Vectors, query: Vectors, relevance: float, k: int
) -> list[int]:
    """Places of at most k of the ``vectors`` (n, d), chosen one after the other by maximal marginal
    relevance (Carbonell and Goldstein, SIGIR 1998): ``relevance`` times the similarity to the query
    (d,), minus 1 - ``relevance`` times the largest similarity to one that is chosen. Of ties the
    first."""
    alike = vectors @ vectors.T
    value = relevance * (vectors @ query)
    nearest = np.full(len(vectors), -np.inf, np.float32)  # to those that are chosen
    chosen: list[int] = []
    for _ in range(min(k, len(vectors))):
        penalty = (1 - relevance) * nearest if chosen else np.zeros_like(nearest)
        left = value - penalty
        left[chosen] = -np.inf
        chosen.append(int(left.argmax()))
        nearest = np.maximum(nearest, alike[chosen[-1]])
    return chosen


class Retriever:
    """Finds the chunks for a question, by their vectors, their words and their metadata.

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
        self._texts = _OfGeneration(catalog, self._words)
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

    def retrieve(self, question: str, k: int, **options: Unpack[_SearchOptions]) -> list[Passage]:
        """The chunks that :class:`SearchOptions` ask for, and the neighbours of each.

        Documents are ordered by their best chunk, and the chunks of one document by their place in
        it, without duplicates: text that a chunk refers back to stands before it, as in the
        document. A hit has its own score, the cosine similarity; a neighbour has the best score of
        its hits.

        The indexes are refreshed first, so that replaced and deleted chunks are not found. Returns
        [] if there is nothing to search. Raises PromptError for an empty question, and ConfigError
        for options out of their range, a filter that is none, and if bm25s is needed and not
        installed.
        """
        return self._retrieve(question, SearchOptions(k, **options))

    def _retrieve(self, question: str, options: SearchOptions) -> list[Passage]:
        accepted = None if options.filter is None else MetadataFilter.of(options.filter)
        if not question.strip():
            raise PromptError("The question is empty: there is nothing to search for.")
        if options.retrieval != "dense":
            check_installed()
        self._refresh_index()
        _, index = self._current
        if not len(index):
            return []
        among = None if accepted is None else self._filters.rows(accepted)
        hidden = {row for document in options.without for row in self.catalog.rows_of(document)}
        query = self.embed_question(question)
        depth = options.depth + len(hidden)
        while True:
            found: list[list[int]] = []
            scores: dict[int, float] = {}
            if options.retrieval != "bm25":
                values, nearest = index.search(query[None], depth, among)
                found.append(nearest[0].tolist())
                scores = dict(zip(found[0], values[0].tolist(), strict=True))
            if options.retrieval != "dense":
                found.append(self._texts.current().search(question, depth, among))
            order = fused_ranks([[row for row in rows if row not in hidden] for rows in found])
            if options.selects or options.retrieval != "dense":
                order, scores = self._selected(query, order, options)
            # Chunks that share words may be less similar than the threshold: those that are follow.
            more = options.min_score is not None and options.retrieval != "dense"
            if not more or len(order) >= options.k or max(map(len, found)) < depth:
                break
            depth *= 4
        return self._arrange({row: scores[row] for row in order[: options.k]}, options.neighbours)

    def _selected(
        self, query: Vectors, order: list[int], options: SearchOptions
    ) -> tuple[list[int], dict[int, float]]:
        """Of the rows ``order``, best first, those that the options select, and the cosine
        similarities of all that are stored."""
        vectors: dict[int, Vectors] = {}
        try:
            vectors = dict(zip(order, self.catalog.vectors_of(order), strict=True))
        except KeyError:  # one was deleted since the search
            for row in order:
                with suppress(KeyError):
                    vectors[row] = self.catalog.vectors_of([row])[0]
        if not vectors:
            return [], {}
        known = np.stack([*vectors.values()])
        scores = dict(zip(vectors, inner_products(known, query).tolist(), strict=True))
        if options.min_score is not None:
            vectors = {row: v for row, v in vectors.items() if scores[row] >= options.min_score}
        if options.mmr is not None and vectors:
            known = np.stack([*vectors.values()])
            chosen = most_relevant_and_unlike(known, query, options.mmr, options.k)
            return [[*vectors][at] for at in chosen], scores
        return [*vectors], scores

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

    def _words(self) -> BM25Index:
        rows: list[int] = []
        texts: list[str] = []
        while page := self.catalog.page(rows[-1] if rows else -1, 1000):
            rows += [row for row, _ in page]
            texts += [chunk.text for _, chunk in page]
        return BM25Index(rows, texts)

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


class _OfGeneration(Generic[_T]):
    """Something made from the catalog, made anew when documents have changed."""

    def __init__(self, catalog: _Catalog, make: Callable[[], _T]) -> None:
        self._catalog, self._make = catalog, make
        self._lock = Lock()
        self._current: tuple[int, _T] | None = None

    def current(self) -> _T:
        """That of the catalog's current generation, or of a later one."""
        with self._lock:
            generation = self._catalog.generation
            if self._current is None or self._current[0] != generation:
                self._current = generation, self._make()
            return self._current[1]


@dataclass(frozen=True, slots=True)
class _Described:
    """The metadata of all documents, and the rows that filters have let pass."""

    documents: Sequence[tuple[Mapping[str, Any], range]]
    passed: dict[bytes, Ids] = field(default_factory=dict)  # the last used one last


class _FilteredRows:
    """The rows that filters let pass, of the catalog's current generation.

    A search with a filter is then as exact as one without: the index searches these rows alone.
    """

    _MOST = 64  # filters whose rows are kept

    def __init__(self, catalog: _Catalog) -> None:
        self._lock = Lock()
        self._described = _OfGeneration(
            catalog,
            lambda: _Described([(typed_metadata(m), rows) for m, rows in catalog.described()]),
        )

    def rows(self, accepted: MetadataFilter) -> Ids:
        """Rows, ascending, of the chunks of all documents that a filter lets pass."""
        with self._lock:
            described = self._described.current()
            found = described.passed.pop(accepted.digest, None)
            if found is None:
                passing = (r for metadata, r in described.documents if accepted.passes(metadata))
                found = np.sort(np.fromiter(chain.from_iterable(passing), np.int64))
            described.passed[accepted.digest] = found
            if len(described.passed) > self._MOST:
                del described.passed[next(iter(described.passed))]
            return found


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}: ask for at least 1 chunk")
