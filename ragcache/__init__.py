"""Reuse the KV of retrieved chunks in any prompt of a RAG service.

Start with :class:`RagCache`; ``ragcache.types`` is the vocabulary, ``ragcache.errors`` what can
go wrong. Importing this package loads no torch: that happens when ``RagCache`` is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragcache.errors import (
    ConfigError,
    ModelError,
    PromptError,
    RagCacheError,
    SourceError,
    StoreError,
)
from ragcache.types import Answer, Chunk, Document, Report, Sampling

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Chunk",
    "ConfigError",
    "Document",
    "ModelError",
    "PromptError",
    "RagCache",
    "RagCacheError",
    "Report",
    "Sampling",
    "SourceError",
    "StoreError",
]

if TYPE_CHECKING:
    from ragcache.rag import RagCache
else:  # type checkers must not see __getattr__: with it, they would accept any name

    def __getattr__(name: str) -> object:
        if name == "RagCache":
            from ragcache.rag import RagCache

            return RagCache
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
