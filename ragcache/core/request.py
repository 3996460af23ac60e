"""One question with everything that was asked for, made once where it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragcache.settings import Ratio
from ragcache.types import Chunk, Passage, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """A question, and how it is to be answered. What is None comes from the settings."""

    question: str
    chunks: Sequence[Chunk] | Sequence[Passage] | None = None  # instead of retrieval
    lead: str = ""  # instructions and earlier turns
    mode: str | None = None
    ratio: Ratio | None = None
    top_k: int | None = None
    neighbours: int | None = None
    require_chunks: bool | None = None
    sampling: Sampling | None = None
