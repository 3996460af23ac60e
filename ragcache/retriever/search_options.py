"""What may be asked of a search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

from ragcache.errors import ConfigError
from ragcache.retriever.metadata import Filter

__all__ = ["Retrieval", "SearchOptions"]

#: What chunks are found by: the similarity of vectors, the words that they share with the question,
#: or both, each giving every chunk its rank.
Retrieval = Literal["dense", "bm25", "hybrid"]
RETRIEVALS: tuple[Retrieval, ...] = "dense", "bm25", "hybrid"


class SearchFields(TypedDict, total=False):
    """Fields of :class:`SearchOptions`, except for ``k``."""

    neighbours: int
    retrieval: Retrieval
    filter: Filter | None
    min_score: float | None
    mmr: float | None
    rerank: int
    top_tokens: int | None
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
    #: How many of the chunks that were found a reranker puts in its own order, of which the first
    #: ones are taken. 0: the order stays as it was found.
    rerank: int = 0
    #: The most tokens of the chunks, their neighbours included: chunks are taken, the best first,
    #: until the next one has no room. None: any number.
    top_tokens: int | None = None
    without: Iterable[str] = ()  # documents to leave out

    def __post_init__(self) -> None:
        check_k(self.k)
        if self.retrieval not in RETRIEVALS:
            raise ConfigError(
                f"retrieval is {self.retrieval!r}: choose one of {', '.join(RETRIEVALS)}"
            )
        for name, least in (("neighbours", 0), ("rerank", 0), ("top_tokens", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and (name, value) != ("top_tokens", None):
                raise ConfigError(f"{name} is {value!r}: it is a whole number from {least} on")
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
    def candidates(self) -> int:
        """How many chunks are to be found, of which k are taken."""
        return max(self.k, self.rerank)

    @property
    def depth(self) -> int:
        """How many chunks each index is asked for."""
        if self.retrieval == "dense" and self.mmr is None:
            return self.candidates
        return max(50, 4 * self.candidates)


def check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k is {k}: ask for at least 1 chunk")
