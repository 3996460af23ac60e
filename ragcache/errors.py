"""What can go wrong, in one tree.

::

    RagCacheError
    ├── ConfigError   a setting, mode, ratio or option that cannot be (also a ValueError)
    ├── ModelError    a model that cannot be loaded, or that the engine would get wrong
    ├── PromptError   a question or prompt that cannot be answered (also a ValueError)
    │   ├── ContextError   a prompt and its answer do not fit the model's context
    │   └── NoChunksError  there is nothing to answer from, where that is required
    ├── SourceError   a document that cannot be read
    └── StoreError    a store that cannot be opened, read or written
        ├── FullError     a store that may hold no more
        ├── LockedError   a store that another process writes
        └── RemoteError   a remote that cannot be reached, or does not let us

Every message says what happened, why, and what to do about it.
"""

from __future__ import annotations


class RagCacheError(Exception):
    """Base of everything ragcache raises on purpose."""


class ConfigError(RagCacheError, ValueError):
    """A setting, mode, ratio or option that is not valid here."""


class ModelError(RagCacheError):
    """A model that cannot be loaded, or that the engine would get wrong."""


class PromptError(RagCacheError, ValueError):
    """A question or prompt that cannot be answered."""


class ContextError(PromptError):
    """A prompt and its answer do not fit the model's context."""


class NoChunksError(PromptError):
    """There are no chunks to answer from, and an answer without any is not wanted."""


class SourceError(RagCacheError):
    """A document that cannot be read."""


class StoreError(RagCacheError):
    """A store that cannot be opened, read or written.

    ``key`` and ``reason`` are set where one chunk's record turned out unusable after it had been
    resolved: the caller drops that chunk, counts the miss and goes on.
    """

    def __init__(self, message: str, *, key: bytes | None = None, reason: str | None = None):
        super().__init__(message)
        self.key = key
        self.reason = reason


class FullError(StoreError):
    """A store that is full: its quota is used up by chunks that may not be evicted."""


class LockedError(StoreError):
    """A store that another process writes: it can be read all the same."""


class RemoteError(StoreError):
    """A remote that cannot be reached, or denies access."""
