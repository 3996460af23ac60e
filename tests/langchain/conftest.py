"""A small store, and the two places that answers come from: this process, and a service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document

from ragcache.langchain import RagCacheVectorStore
from ragcache.pipeline import RagCache
from tests import scene
from tests.langchain import stub

PLACES = ["store", "service"]
DOCUMENTS = [Document(d.text, id=d.id, metadata={"title": d.id}) for d in scene.DOCUMENTS]
QUESTION = "Where does Mira Holt live?"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    with scene.small(tmp_path_factory.mktemp("store")) as cache:
        RagCacheVectorStore(cache).add_documents(DOCUMENTS)
        yield cache


@pytest.fixture(scope="module")
def service(cache: RagCache) -> Iterator[stub.Stub]:
    with stub.serve(cache) as running:
        yield running


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What ChatRagCache is told about where answers come from: ask for it with one of PLACES.

    ``SERVICE_URL`` and ``SERVICE_KEY`` name a running service to be tested instead of the stub.
    """
    if request.param == "store":
        return {"store": request.getfixturevalue("cache")}
    if url := os.environ.get("SERVICE_URL"):
        return {"base_url": url, "api_key": os.environ.get("SERVICE_KEY")}
    return {"base_url": request.getfixturevalue("service").url, "api_key": stub.KEY}
