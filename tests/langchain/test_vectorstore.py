"""The vector store beyond the standard suites, and the retriever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore

from ragcache.errors import ConfigError, SourceError
from ragcache.langchain import (
    ChatRagCache,
    RagCacheRetriever,
    RagCacheVectorStore,
    from_documents,
    rag_messages,
)
from ragcache.rag import RagCache
from ragcache.types import Document as StoreDocument
from tests import scene
from tests.langchain.conftest import DOCUMENTS, QUESTION

LONG = "Mira Holt keeps a parrot. " * 6 + "She plays the cello and lives by the sea. " * 6


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path) as cache:
        yield cache


@pytest.fixture
def store(cache: RagCache) -> RagCacheVectorStore:
    store = RagCacheVectorStore(cache)
    store.add_documents(DOCUMENTS)
    return store


def test_adding_precomputes_with_progress(cache: RagCache) -> None:
    told: list[tuple[str, int, int]] = []
    RagCacheVectorStore(cache).add_documents(DOCUMENTS, progress=lambda *what: told.append(what))
    assert {stage for stage, _, _ in told} == {"index", "precompute"}
    assert told[-1] == ("precompute", 4, 4)  # the prefix too
    answer = ChatRagCache(store=cache).invoke(rag_messages(QUESTION, DOCUMENTS))
    assert all(c["miss"] is None for c in answer.response_metadata["ragcache"]["chunks"])


def test_what_is_there_unchanged_costs_nothing(store: RagCacheVectorStore) -> None:
    told: list[tuple[str, int, int]] = []
    store.add_documents(DOCUMENTS, progress=lambda *what: told.append(what))
    assert all(total == 0 for _, _, total in told)


def test_metadata_come_back_as_they_were(store: RagCacheVectorStore) -> None:
    metadata = {"n": 1, "f": 0.5, "none": None, "list": [1, "a"], "s": "1", "langchain": "own"}
    metadata |= {"ragcache": "whole", "format": "markdown"}
    (name,) = store.add_documents([Document("Some text.", metadata=metadata)])
    assert store.get_by_ids([name])[0].metadata == metadata
    with pytest.raises(SourceError, match="metadata of x cannot be stored"):
        store.add_documents([Document("Some text.", id="x", metadata={"a": object()})])


def test_a_document_is_one_chunk(store: RagCacheVectorStore, cache: RagCache) -> None:
    store.add_documents([Document(LONG, id="long")])
    assert len(cache.catalog.rows_of("long")) == 1
    assert store.get_by_ids(["long"])[0].page_content == LONG


def test_a_split_documents_chunks_have_ids_of_their_own(cache: RagCache) -> None:
    store = RagCacheVectorStore(cache, splitting=True)
    assert store.add_documents([Document(LONG, id="long")]) == ["long"]
    chunks = store.get_by_ids(["long"])
    assert [chunk.id for chunk in chunks] == [f"long#{n}" for n in range(len(chunks))]
    assert len(chunks) > 1
    assert store.get_by_ids(["long#1", "long#99", "other#0"]) == [chunks[1]]
    assert store.similarity_search("cello", k=1)[0] in chunks
    with pytest.raises(ConfigError, match="long#1 is a chunk of 'long'"):
        store.delete(["long#1"])
    store.delete(["long"])
    assert store.get_by_ids(["long", "long#0"]) == []


@pytest.mark.parametrize(
    ("documents", "ids", "says"),
    [
        ([Document(" ")], None, "has no text"),
        ([Document("a b " * 2000, id="x")], None, "x has .* tokens, and .* less than the 512"),
        ([Document("a"), Document("b")], ["1", "1"], "given to several"),
        ([Document("a")], ["1", "2"], "1 documents but 2 ids"),
    ],
)
def test_what_cannot_be_added_is_refused_whole(
    cache: RagCache, documents: list[Document], ids: list[str] | None, says: str
) -> None:
    store = RagCacheVectorStore(cache)
    with pytest.raises((SourceError, ConfigError), match=says):
        store.add_documents([*documents], ids=ids)
    assert cache.documents() == []


def test_the_longest_text_that_is_taken_is_stored(cache: RagCache) -> None:
    store, most = RagCacheVectorStore(cache), cache.engine.context_tokens
    text = "She plays" + "." * (most - cache.indexing.splitter.count("She plays"))
    assert cache.indexing.splitter.count(text) == most
    with pytest.raises(SourceError, match=f"x has {most} tokens"):
        store.add_texts([text], ids=["x"])
    store.add_texts([text[:-1]], ids=["x"])
    [key] = cache.indexing.keys("x")
    assert len(key.tokens) == most - 1 and cache.store.has(key)


def test_one_thing_is_no_list(store: RagCacheVectorStore, cache: RagCache) -> None:
    one: Any = "holt"
    for call in (
        lambda: store.delete(one),
        lambda: asyncio.run(store.adelete(one)),
        lambda: store.get_by_ids(one),
        lambda: store.add_texts(one),
        lambda: store.add_texts(["text"], ids=one),
        lambda: store.add_texts(["text"], {"n": 1}),  # type: ignore[arg-type]
        lambda: asyncio.run(store.aadd_texts(one)),
        lambda: store.add_documents(one),
        lambda: store.add_documents(Document("text")),  # type: ignore[arg-type]
        lambda: RagCacheVectorStore.from_texts(one, store=cache),
        lambda: store.embeddings.embed_documents(one),
        lambda: list(from_documents(one)),
    ):
        with pytest.raises(ConfigError, match=r"is one \w+: give a list, such as \["):
            call()
    assert len(cache.documents()) == len(DOCUMENTS)


def test_no_text_is_left_out(store: RagCacheVectorStore, cache: RagCache) -> None:
    for ids in ([], ["1"], ["1", "2", "3"]):
        with pytest.raises(ConfigError, match=f"2 documents but {len(ids)} ids"):
            store.add_texts(["one", "two"], ids=ids)
    for number in (0, 1, 3):
        metadatas: list[dict[str, Any]] = [{}] * number
        with pytest.raises(ConfigError, match=f"2 texts but {len(metadatas)} metadatas"):
            store.add_texts(["one", "two"], metadatas)
    with pytest.raises(ConfigError, match="an id is empty"):
        store.add_texts(["one"], ids=[""])
    assert len(cache.documents()) == len(DOCUMENTS)


def test_nothing_is_not_everything(store: RagCacheVectorStore, cache: RagCache) -> None:
    store.delete([])
    assert len(cache.documents()) == len(DOCUMENTS)
    assert not store.get_by_ids([]) and not store.add_texts([])
    assert len(store.similarity_search("mill", k=3, filter={})) == 3
    with pytest.raises(ConfigError, match="k is 0: ask for at least 1"):
        store.similarity_search("mill", k=0)


def test_unknown_options_are_errors(store: RagCacheVectorStore) -> None:
    wrong: Any = {"filters": {"title": "holt"}}
    for method in ("similarity_search", "max_marginal_relevance_search"):
        with pytest.raises(TypeError, match="argument 'filters'|filters: no option"):
            getattr(store, method)("mill", **wrong)
    with pytest.raises(TypeError, match="argument 'filters'|filters: no option"):
        store.delete(["holt"], **wrong)
    with pytest.raises(TypeError, match="argument 'filters'|filters: no option"):
        store.add_texts(["text"], **wrong)


def test_deleting_all_leaves_no_kv(store: RagCacheVectorStore, cache: RagCache) -> None:
    store.delete()
    assert cache.documents() == []
    assert cache.store.stats().chunks == 1  # the prefix


def test_filters(store: RagCacheVectorStore) -> None:
    def search(filter: Any) -> list[str | None]:
        return [d.id for d in store.similarity_search("old mill", k=3, filter=filter)]

    assert search(None)[0] == "mill"
    assert search({"title": "holt"}) == ["holt"]
    assert search({"title": "holt", "other": 1}) == []
    assert search(lambda d: d.id != "mill") == [n for n in search(None) if n != "mill"]


def test_filters_have_operators_and_see_typed_metadata(store: RagCacheVectorStore) -> None:
    store.add_texts(
        ["An old mill.", "A new mill."], [{"year": 1900}, {"year": 1990}], ids=["o", "n"]
    )

    def search(filter: Any) -> list[str]:
        return sorted(str(d.id) for d in store.similarity_search("mill", k=9, filter=filter))

    assert search({"year": {"$lt": 1950}}) == ["o"]
    assert search({"year": {"$in": [1900, 1990]}}) == ["n", "o"]
    assert search({"$not": {"year": {"$exists": True}}}) == sorted({"mill", "holt", "boats"})
    with pytest.raises(ConfigError, match=r"filter\.year\.\$before is no operator"):
        search({"year": {"$before": 1950}})


def test_documents_of_others_may_use_any_key(cache: RagCache) -> None:
    for value in ("hello", "[1]", "5", "[" * 16_000):
        cache.add([StoreDocument("other", "Mira Holt keeps a parrot.", {"langchain": value})])
        retriever = RagCacheRetriever(store=cache, k=1)
        for filter in ({}, {"langchain": value}):
            (found,) = retriever.invoke("parrot", filter=filter)
            assert found.metadata == {"langchain": value}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_retriever_takes_filters(store: RagCacheVectorStore, asynchronous: bool) -> None:
    retriever = RagCacheRetriever(store=store.backend.cache, k=3, filter={"title": "holt"})

    def search(**options: Any) -> set[str]:
        found = (
            asyncio.run(retriever.ainvoke("mill", **options))
            if asynchronous
            else retriever.invoke("mill", **options)
        )
        return {str(document.metadata["title"]) for document in found}

    assert search() == {"holt"}
    assert search(filter={"title": {"$ne": "holt"}}) == {"mill", "boats"}
    with pytest.raises(ConfigError, match="filter is"):
        search(filter=["title"])
    assert search(filter={}, k=1, retrieval="bm25") == {"mill"}
    assert search(filter={}, retrieval="hybrid", min_score=0.99) == set()
    assert len(search(filter={}, k=2, mmr=0.5)) == 2
    with pytest.raises(ConfigError, match="mmr is 2"):
        search(mmr=2)
    with pytest.raises(ConfigError, match="no reranker"):
        search(rerank=2)
    assert search(filter={}, k=None, top_tokens=10**4) == {"holt", "mill", "boats"}
    assert search(filter={}, top_tokens=1) == set()
    with pytest.raises(TypeError, match="min_scores: unknown option of a retriever. Did you mean"):
        search(min_scores=2)


def test_a_filter_looks_beyond_the_first_hits(cache: RagCache) -> None:
    store = RagCacheVectorStore(cache)
    texts = [f"The old mill, number {n}." for n in range(30)]
    store.add_texts(texts, [{"n": n} for n in range(30)])
    for n in range(30):
        (found,) = store.similarity_search("The old mill", k=2, filter={"n": n})
        assert found.page_content == texts[n]


def test_scores_are_cosines(store: RagCacheVectorStore) -> None:
    found = store.similarity_search_with_score("the old mill", k=3)
    query = np.array(store.embeddings.embed_query("the old mill"))
    for document, score in found:
        vector = np.array(store.embeddings.embed_documents([document.page_content])[0])
        assert score == pytest.approx(query @ vector, abs=1e-6)
    relevance = store.similarity_search_with_relevance_scores("the old mill", k=3)
    assert [s for _, s in relevance] == pytest.approx([(1 + s) / 2 for _, s in found])


def test_mmr_is_langchains_own(cache: RagCache) -> None:
    """The same as the reference vector store of langchain-core over the same vectors."""
    store = RagCacheVectorStore(cache)
    texts = ["the old mill", "the mill stands still", "an old boat", "the boat is a fast one"]
    store.add_texts(texts)
    reference = InMemoryVectorStore(store.embeddings)
    reference.add_texts(texts)
    for weight in (0.3, 0.5, 0.7, 1.0):
        own = store.max_marginal_relevance_search("the old mill", 3, 4, weight)
        want = reference.max_marginal_relevance_search("the old mill", 3, 4, weight)
        assert [d.page_content for d in own] == [d.page_content for d in want]
    vector = [2 * x for x in store.embeddings.embed_query("a boat")]
    by_vector = store.max_marginal_relevance_search_by_vector(vector, 2)
    assert by_vector == store.max_marginal_relevance_search("a boat", 2)
    assert store.similarity_search_by_vector(vector, 2) == store.similarity_search("a boat", 2)


def test_async_is_the_same(store: RagCacheVectorStore) -> None:
    vector = store.embeddings.embed_query("old mill")
    pairs = [
        ("similarity_search", ("old mill", 2)),
        ("similarity_search_with_score", ("old mill", 2)),
        ("similarity_search_by_vector", (vector, 2)),
        ("max_marginal_relevance_search", ("old mill", 2)),
        ("max_marginal_relevance_search_by_vector", (vector, 2)),
    ]
    for name, given in pairs:
        assert asyncio.run(getattr(store, f"a{name}")(*given)) == getattr(store, name)(*given)
    assert asyncio.run(store.adelete(["mill"])) is True
    assert [d.id for d in asyncio.run(store.aget_by_ids(["mill", "holt"]))] == ["holt"]


def test_from_texts(cache: RagCache) -> None:
    store = RagCacheVectorStore.from_texts(["one text", "another"], ids=["1", "2"], store=cache)
    assert [d.id for d in store.similarity_search("another", 1)] == ["2"]
    same = RagCacheVectorStore.from_texts([], store.embeddings, store=cache)
    assert same.backend is store.backend
    with pytest.raises(ConfigError, match="has its own embedder"):
        RagCacheVectorStore.from_texts([], DeterministicFakeEmbedding(size=8), store=cache)


def test_the_retriever_is_the_pipelines_own(cache: RagCache) -> None:
    cache.add(scene.DOCUMENTS)  # split into several chunks each
    retriever = RagCacheRetriever(store=cache)
    own = [passage.chunk for passage in cache.retrieve(QUESTION)]
    assert [d.page_content for d in retriever.invoke(QUESTION)] == [c.text for c in own]
    assert [d.id for d in retriever.invoke(QUESTION)] == [c.id for c in own]
    alone = RagCacheRetriever(store=cache, k=1, neighbours=0)
    assert len(alone.invoke(QUESTION)) == 1
    assert len(alone.invoke(QUESTION, k=3)) == 3
    assert len(asyncio.run(alone.ainvoke(QUESTION, neighbours=1))) > 1


def test_a_stores_own_retriever_takes_filters(store: RagCacheVectorStore) -> None:
    kwargs = {"k": 2, "filter": {"title": "boats"}}
    assert [d.id for d in store.as_retriever(search_kwargs=kwargs).invoke("mill")] == ["boats"]
    mmr = store.as_retriever(search_type="mmr", search_kwargs={"k": 2})
    assert len(asyncio.run(mmr.ainvoke("mill"))) == 2


def test_what_a_loader_gives(tmp_path: Path) -> None:
    given = [
        Document("One.", metadata={"source": "a.txt", "page": 1}),
        Document("Two.", metadata={"source": "a.txt", "page": 2}),
        Document("Three.", id="three"),
        Document("Four."),
    ]
    found = list(from_documents(given))
    assert [one.id for one in found] == ["a.txt#0", "a.txt#1", "three", "document#1"]
    assert [one.text for one in found] == ["One.", "Two.", "Three.", "Four."]
    assert found[0].metadata == {"source": "a.txt", "langchain": '{"page": 1}'}
