"""A small store, and both backends: this process and a service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document

from ragcache.langchain import RagCacheVectorStore
from ragcache.rag import RagCache
from tests import scene
from tests.api.conftest import ANN, served
from tests.langchain import stub

PLACES = ["store", "service"]
DOCUMENTS = [Document(d.text, id=d.id, metadata={"title": d.id}) for d in scene.DOCUMENTS]
FIND_CHARS = 200  # all documents together are longer, and each is shorter
SETTINGS: dict[str, Any] = {"find_chars": FIND_CHARS, "chat_bytes": 0}  # no earlier turns
QUESTION = "Where does Mira Holt live?"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    with scene.small(
        tmp_path_factory.mktemp("store"), find_chars=FIND_CHARS, chat_bytes=0
    ) as cache:
        RagCacheVectorStore(cache).add_documents(DOCUMENTS)
        yield cache


@pytest.fixture(scope="module")
def service(cache: RagCache) -> Iterator[stub.Stub]:
    with stub.serve(cache) as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a service that has the same documents."""
    with served(
        tmp_path_factory.mktemp("served"),
        find_chars=FIND_CHARS,
        chat_bytes=0,
        trust_request_templates=True,
    ) as one:
        RagCacheVectorStore(one.service.cache("ann")).add_documents(DOCUMENTS)
        yield f"{one.url}/v1"


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of ChatRagCache that say where answers come from, for one of PLACES."""
    if request.param == "store":
        return {"store": request.getfixturevalue("cache")}
    return {"base_url": request.getfixturevalue("running"), "api_key": ANN}
