"""Retrieve passages for a question: by vectors, by words or by both, and by metadata, over indexes
that are kept up to date with the catalog."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Unpack

import numpy as np

from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.bm25 import BM25Index, check_installed
from ragcache.retriever.current_index import CurrentIndex
from ragcache.retriever.embed import Embedder, QuestionEmbedder
from ragcache.retriever.index import Vectors, inner_products
from ragcache.retriever.index_description import IndexDescription
from ragcache.retriever.metadata import Filter, MetadataFilter
from ragcache.retriever.ranking import fused_ranks, most_relevant_and_unlike
from ragcache.retriever.rerank import Reranker
from ragcache.retriever.search_options import SearchFields, SearchOptions, check_k
from ragcache.retriever.searched_catalog import (
    FilteredRows,
    OfGeneration,
    SearchedCatalog,
    vectors_there,
)
from ragcache.types import Chunk, Passage

__all__ = ["Retriever"]


class Retriever:
    """Finds the chunks for a question, by their vectors, their words and their metadata.

    ``reranker``: puts what was found in an order of its own, where a search asks for it.
    ``count_tokens``: the number of tokens of a chunk's text in a prompt; searches with
    ``top_tokens`` need it.
    ``index``, the setting, ``index_path``, ``index_recall`` and ``may_save`` are as
    :class:`~ragcache.retriever.current_index.CurrentIndex` takes them. Any number of threads may
    retrieve while one refreshes. Raises ConfigError for an unknown kind of index, and if the
    catalog's vectors have another dimension than the embedder's.
    """

    def __init__(
        self,
        catalog: SearchedCatalog,
        embedder: Embedder,
        index_path: Path,
        index: str = "auto",
        *,
        index_recall: float = 0.98,
        reranker: Reranker | None = None,
        count_tokens: Callable[[str], int] | None = None,
        may_save: Callable[[], bool] = lambda: True,
    ):
        self.catalog = catalog
        self.embedder = embedder
        self.reranker = reranker
        self._count_tokens = count_tokens
        self._vectors = CurrentIndex(
            catalog,
            embedder.dimension,
            index_path,
            index,
            recall=index_recall,
            embedder=embedder.name,
            may_save=may_save,
        )
        self._filters = FilteredRows(catalog)
        self._texts = OfGeneration(catalog, self._words)

    @property
    def generation(self) -> int:
        """The catalog's generation from which the current index was built."""
        return self._vectors.generation

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def index(self) -> IndexDescription:
        """The kind of the index that answers now, and its recall."""
        return self._vectors.description

    def refresh(self) -> bool:
        """Bring the index up to date if the catalog has changed; returns whether it had.

        Rebuilding an exact index takes about as long as reading the vectors; an approximate one is
        rebuilt in a thread, if much has changed. A file that cannot be written is logged and
        otherwise ignored: the next process rebuilds the index.
        """
        return self._vectors.refresh()

    @property
    def is_building(self) -> bool:
        """Whether the next index is being built."""
        return self._vectors.is_building

    def finish(self) -> None:
        """Wait for an index that is being built to be in use and saved."""
        self._vectors.finish()

    def close(self) -> None:
        """Stop building an index. The catalog's owner closes the catalog afterwards."""
        self._vectors.close()

    def retrieve(self, question: str, k: int, **options: Unpack[SearchFields]) -> list[Passage]:
        """:meth:`search` with :class:`SearchOptions` of these."""
        return self.search(question, SearchOptions(k, **options))

    def search(self, question: str, options: SearchOptions) -> list[Passage]:
        """The chunks that the options ask for, and the neighbours of each.

        Documents are ordered by their best chunk, and the chunks of one document by their place in
        it, without duplicates: text that a chunk refers back to stands before it, as in the
        document. A hit has its own score, the cosine similarity; a neighbour has the best score of
        its hits.

        The indexes are refreshed first, so that replaced and deleted chunks are not found. Returns
        [] if there is nothing to search. Raises PromptError for an empty question, and ConfigError
        for a filter that is none, and if what is needed is missing: bm25s, a reranker, or a
        function that counts tokens.
        """
        accepted = None if options.filter is None else MetadataFilter.of(options.filter)
        if not question.strip():
            raise PromptError("The question is empty: there is nothing to search for.")
        if options.retrieval != "dense":
            check_installed()
        if options.rerank and self.reranker is None:
            raise ConfigError(
                f"rerank is {options.rerank}, and there is no reranker: set reranker to the name "
                "or folder of a cross-encoder"
            )
        index = self._vectors.current()
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
            if not more or len(order) >= options.candidates or max(map(len, found)) < depth:
                break
            depth *= 4
        if options.rerank:
            order = self._reranked(question, order, options.rerank)
        return self._arrange({row: scores[row] for row in order[: options.k]}, options)

    def _selected(
        self, query: Vectors, order: list[int], options: SearchOptions
    ) -> tuple[list[int], dict[int, float]]:
        """Of the rows ``order``, best first, those that the options select, and the cosine
        similarities of all that are stored."""
        there, known = vectors_there(self.catalog, order)  # some may be deleted since the search
        vectors = dict(zip(there.tolist(), known, strict=True))
        if not vectors:
            return [], {}
        scores = dict(zip(vectors, inner_products(known, query).tolist(), strict=True))
        if options.min_score is not None:
            vectors = {row: v for row, v in vectors.items() if scores[row] >= options.min_score}
        if options.mmr is not None and vectors:
            known = np.stack([*vectors.values()])
            chosen = most_relevant_and_unlike(known, query, options.mmr, options.candidates)
            return [[*vectors][at] for at in chosen], scores
        return [*vectors], scores

    def ranked(
        self, question: str | Vectors, k: int, filter: Filter | None = None
    ) -> list[tuple[int, Passage]]:
        """Rows and passages of the k nearest chunks that a ``filter`` lets pass, nearest first,
        after a refresh.

        ``question`` may be a vector (dimension,) of length 1. Raises as :meth:`search`.
        """
        check_k(k)
        accepted = None if filter is None else MetadataFilter.of(filter)
        if isinstance(question, str):
            if not question.strip():
                raise PromptError("The question is empty: there is nothing to search for.")
            question = self.embed_question(question)
        index = self._vectors.current()
        among = None if accepted is None else self._filters.rows(accepted)
        scores, rows = index.search(question[None], k, among)
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            with suppress(KeyError):  # deleted since the search
                found.append((row, Passage(self.catalog.chunk(row), score)))
        return found

    def _reranked(self, question: str, order: list[int], most: int) -> list[int]:
        """The first ``most`` of the rows ``order`` as the reranker orders them, of ties the first
        one first, and then the others."""
        assert self.reranker is not None
        texts: dict[int, str] = {}
        for row in order[:most]:
            with suppress(KeyError):  # deleted since the search
                texts[row] = self.catalog.chunk(row).text
        scores = self.reranker.scores(question, [*texts.values()])
        best = np.argsort(-scores, kind="stable")
        rows = [*texts]
        return [rows[at] for at in best] + order[most:]

    def _arrange(self, hits: dict[int, float], options: SearchOptions) -> list[Passage]:
        """Passages of the hits, best first, and of their neighbours in reading order, as many as
        there is room for."""
        room = options.top_tokens
        documents: dict[str, dict[int, float]] = {}  # in the order of their best hits
        chunks: dict[int, Chunk] = {}
        for row, score in hits.items():
            try:
                name = self._chunk(row, chunks).document
                near = self._around(row, self.catalog.rows_of(name), options.neighbours)
            except KeyError:  # deleted since the search
                continue
            known = documents.get(name, {})
            if room is not None:
                needs = self._tokens([other for other in near if other not in known], chunks)
                if needs > room:
                    near = [row]
                    needs = self._tokens([row for row in near if row not in known], chunks)
                if needs > room:
                    break
                room -= needs
            documents[name] = known | {other: max(known.get(other, score), score) for other in near}
        passages = []
        for scores in documents.values():
            for row in sorted(scores):
                with suppress(KeyError):
                    chunk = self._chunk(row, chunks)
                    passages.append(Passage(chunk, hits.get(row, scores[row])))
        return passages

    def _chunk(self, row: int, chunks: dict[int, Chunk]) -> Chunk:
        """The chunk of a row, which ``chunks`` remembers. Raises KeyError if it was deleted."""
        if row not in chunks:
            chunks[row] = self.catalog.chunk(row)
        return chunks[row]

    def _around(self, row: int, rows: list[int], neighbours: int) -> list[int]:
        """A row and its neighbours among the ``rows`` of its document, ascending. Raises KeyError
        if it is none of them any more."""
        at = bisect_left(rows, row)
        if at == len(rows) or rows[at] != row:
            raise KeyError(row)
        return rows[max(0, at - neighbours) : at + neighbours + 1]

    def _tokens(self, rows: list[int], chunks: dict[int, Chunk]) -> int:
        """The tokens of the chunks of rows in a prompt; none of those that were deleted."""
        if self._count_tokens is None:
            raise ConfigError("top_tokens needs a retriever that has count_tokens: give it one")
        tokens = 0
        for row in rows:
            with suppress(KeyError):
                tokens += self._count_tokens(self._chunk(row, chunks).text)
        return tokens

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
