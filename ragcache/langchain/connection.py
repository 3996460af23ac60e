"""Where answers and chunks come from: said once for chat model and retriever alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, model_validator

from ragcache.errors import ConfigError
from ragcache.langchain.backend import Backend
from ragcache.settings import Settings


def check_options(given: Iterable[str], known: set[str], owner: type) -> None:
    """Raise TypeError for options that nobody knows, with those that there are."""
    if unknown := sorted(set(given) - known):
        near = get_close_matches(unknown[0], known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(
            f"{', '.join(unknown)}: no option of {owner.__name__}.{meant} There are "
            + ", ".join(sorted(known))
        )


class Place(BaseModel):
    """A store in this process, or a running service.

    ``store`` is the folder of a store, an open RagCache, or a RagCacheVectorStore; ``base_url`` is
    where a service answers, such as ``http://localhost:8000/v1``. One of them must be given, or set
    as ``RAGCACHE_STORE`` or ``RAGCACHE_BASE_URL``. Nothing is opened before the first use.
    """

    store: Any = None
    base_url: str | None = None
    api_key: SecretStr | None = None
    model: str = ""  # of a store that is not open yet; the service's name of one
    settings: Settings | None = Field(default=None, exclude=True)  # of a store not open yet
    max_retries: int = 2  # of a service that is busy or cannot be reached

    _backend: Backend | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            check_options(given, set(cls.model_fields), cls)
        return given

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        env = os.environ.get
        if self.store is None and self.base_url is None:
            self.base_url = env("RAGCACHE_BASE_URL") or None  # set to nothing: not set
            self.store = (env("RAGCACHE_STORE") or None) if self.base_url is None else None
        if self.base_url is not None and self.api_key is None and (key := env("RAGCACHE_API_KEY")):
            self.api_key = SecretStr(key)
        if (self.store is None) == (self.base_url is None):
            raise ConfigError("give one of store= and base_url=: where should answers come from?")
        return self

    @property
    def backend(self) -> Backend:
        """Where answers come from; opened when it is first asked for. Raises what opening does."""
        if self._backend is None:
            if self.base_url is None:
                from ragcache.langchain.local_backend import Local

                self._backend = Local.of(self.store, self.model, self.settings)
            else:
                from ragcache.langchain.http_backend import Service

                key = self.api_key.get_secret_value() if self.api_key else None
                self._backend = Service(self.base_url, key, max_retries=self.max_retries)
        return self._backend

    async def opened(self) -> Backend:
        """The same for async methods: opening loads a model, which must not block the loop."""
        if self._backend is not None:
            return self._backend
        return await asyncio.to_thread(lambda: self.backend)
