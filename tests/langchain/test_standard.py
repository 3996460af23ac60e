"""LangChain's own standard tests of chat models, vector stores and retrievers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from ragcache.langchain import (
    ChatRagCache,
    RagCacheRetriever,
    RagCacheVectorStore,
    rag_messages,
)
from ragcache.langchain.embeddings import StoreEmbeddings
from ragcache.rag import RagCache
from tests import scene
from tests.langchain.conftest import DOCUMENTS, PLACES, QUESTION

LISTED = "loading with allowed_objects='all' takes only classes that langchain-core itself lists"


class Model:
    """What is the same for all suites of the chat model."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatRagCache

    @property
    def supports_model_override(self) -> bool:
        return False  # one model answers from a store

    @property
    def has_tool_calling(self) -> bool:
        return False  # bind_tools is there to say so

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}


class TestUnitInProcess(Model, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"store": "a-store"}

    @pytest.mark.xfail(reason=LISTED, strict=True)
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"RAGCACHE_STORE": "a-store"}, {}, {"store": "a-store"}


class TestUnitOfAService(Model, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": "http://localhost:8000/v1"}

    @pytest.mark.xfail(reason=LISTED, strict=True)
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        where = {"base_url": "http://localhost:8000/v1", "api_key": "test"}
        return {f"RAGCACHE_{k.upper()}": v for k, v in where.items()}, {}, where


@pytest.mark.parametrize("place", PLACES, indirect=True, scope="module")
class TestChat(Model, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _placed(self, place: dict[str, Any]) -> None:
        self._place = place

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self._place

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {**super().standard_chat_model_params, "max_tokens": 12}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        for _ in range(20):  # a service stores what it did not know when it has nothing else to do
            answer = self._answer(stream)
            assert answer.usage_metadata is not None
            if answer.usage_metadata["input_token_details"]["cache_read"] > 0:
                return answer
            time.sleep(0.1)
        raise AssertionError("nothing was taken from the store")

    def _answer(self, stream: bool) -> AIMessage:
        model, asked = ChatRagCache(**self._place), rag_messages(QUESTION, DOCUMENTS)
        if not stream:
            return model.invoke(asked)
        first, *others = model.stream(asked)
        assert isinstance(first, AIMessageChunk)
        return first.__add__(others)


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture(params=["flat", "numpy"])
    def vectorstore(self, request: Any, tmp_path: Path) -> Iterator[VectorStore]:
        with scene.small(tmp_path, index=request.param) as cache:
            yield RagCacheVectorStore(cache)


class TestSplittingVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        with scene.small(tmp_path) as cache:
            yield RagCacheVectorStore(cache, splitting=True)


class InStore:
    @pytest.fixture(autouse=True)
    def _placed(self, cache: RagCache) -> None:
        self._cache = cache


@pytest.mark.parametrize("place", PLACES, indirect=True)
class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _placed(self, place: dict[str, Any]) -> None:
        self._place = place

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return RagCacheRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {**self._place, "k": 2}

    @property
    def retriever_query_example(self) -> str:
        return "Where is the old mill?"


class TestEmbeddings(InStore, EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return StoreEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"backend": RagCacheVectorStore(self._cache).backend}
