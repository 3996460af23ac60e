"""The options of chat model and retriever that say where the store or service is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, model_validator

from ragcache.errors import ConfigError
from ragcache.langchain.backend import Backend
from ragcache.settings import Settings
from ragcache.util.option_names import check_options


class BackendConnection(BaseModel):
    """A store in this process, or a running service.

    ``store`` is the folder of a store, an open RagCache, or a RagCacheVectorStore; ``base_url`` is
    the URL of a service, such as ``http://localhost:8000/v1``. One of them must be given, or set
    as ``RAGCACHE_STORE`` or ``RAGCACHE_BASE_URL``. Nothing is opened before the first use.
    """

    store: Any = None
    base_url: str | None = None
    api_key: SecretStr | None = None
    model: str = ""  # for a store that is not open yet; or the model name sent to the service
    settings: Settings | None = Field(default=None, exclude=True)  # for a store not open yet
    max_retries: int = 2  # if the service is busy or unreachable

    _backend: Backend | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _check_known(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            check_options(values, set(cls.model_fields), cls.__name__)
        return values

    @model_validator(mode="after")
    def _store_or_url(self) -> Self:
        env = os.environ.get
        if self.store is None and self.base_url is None:
            self.base_url = env("RAGCACHE_BASE_URL") or None  # an empty variable counts as not set
            self.store = (env("RAGCACHE_STORE") or None) if self.base_url is None else None
        if self.base_url is not None and self.api_key is None and (key := env("RAGCACHE_API_KEY")):
            self.api_key = SecretStr(key)
        if (self.store is None) == (self.base_url is None):
            raise ConfigError("give either store= or base_url=, which say where answers come from")
        return self

    @property
    def backend(self) -> Backend:
        """The store or service, opened on first use. Raises the errors of opening it."""
        if self._backend is None:
            if self.base_url is None:
                from ragcache.langchain.local_backend import LocalBackend
                from ragcache.langchain.vectorstore import RagCacheVectorStore

                if isinstance(self.store, RagCacheVectorStore):
                    self._backend = self.store.backend
                else:
                    self._backend = LocalBackend.open(self.store, self.model, self.settings)
            else:
                from ragcache.langchain.http_backend import HttpBackend

                key = self.api_key.get_secret_value() if self.api_key else None
                self._backend = HttpBackend(self.base_url, key, max_retries=self.max_retries)
        return self._backend

    async def aopen_backend(self) -> Backend:
        """The same for async methods: opening loads a model and must not block the event loop."""
        if self._backend is not None:
            return self._backend
        return await asyncio.to_thread(lambda: self.backend)
