"""The exceptions of ragcache.

::

    RagCacheError
    ├── ConfigError   an invalid setting, mode, ratio or option (also a ValueError)
    ├── ModelError    a model that cannot be loaded, or for which the engine would be wrong
    ├── PromptError   a question or prompt that cannot be answered (also a ValueError)
    │   ├── ContextError   a prompt and its answer do not fit the model's context
    │   └── NoChunksError  there are no chunks to answer from, but chunks are required
    ├── SourceError   a document that cannot be read
    └── StoreError    a store that cannot be opened, read or written
        ├── FullError     a store whose quota is used up
        ├── LockedError   a store that another process has open for writing
        └── RemoteError   a remote that cannot be reached, or denies access

Every message says what happened, why, and how to fix it.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ContextError",
    "FullError",
    "LockedError",
    "ModelError",
    "NoChunksError",
    "PromptError",
    "RagCacheError",
    "RemoteError",
    "SourceError",
    "StoreError",
]


class RagCacheError(Exception):
    """Base class of all exceptions that ragcache raises deliberately."""


class ConfigError(RagCacheError, ValueError):
    """An invalid setting, mode, ratio or option."""


class ModelError(RagCacheError):
    """A model that cannot be loaded, or for which the engine would compute wrong results."""


class PromptError(RagCacheError, ValueError):
    """A question or prompt that cannot be answered."""


class ContextError(PromptError):
    """A prompt and its answer do not fit the model's context."""


class NoChunksError(PromptError):
    """There are no chunks to answer from, but the request requires chunks."""


class SourceError(RagCacheError):
    """A document that cannot be read."""


class StoreError(RagCacheError):
    """A store that cannot be opened, read or written.

    ``key`` and ``reason`` are set if one chunk's record turns out to be unusable after it was
    found: the caller then treats that chunk as a miss and continues.
    """

    def __init__(self, message: str, *, key: bytes | None = None, reason: str | None = None):
        super().__init__(message)
        self.key = key
        self.reason = reason


class FullError(StoreError):
    """A store whose quota is used up by chunks that may not be evicted."""


class LockedError(StoreError):
    """A store that another process has open for writing; it can still be read."""


class RemoteError(StoreError):
    """A remote that cannot be reached, or denies access."""
