"""The right chunks in reading order, from an index that is never older than its catalog."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.embed import HashEmbedder, Vectors
from ragcache.retriever.index import Ids
from ragcache.retriever.ranking import fused_ranks, most_relevant_and_unlike
from ragcache.retriever.search import Retriever
from ragcache.retriever.search_options import Retrieval
from tests.retriever.conftest import ListCatalog

Kind = Literal["flat", "numpy"]
EMBEDDER = HashEmbedder(4096)  # wide, so that no two words of these tests share a place

RIVER = ["the river rose", "bridge gone", "ferryman missing", "boat of apples", "river fell"]
MILL = ["old mill", "miller heard singing", "river river"]


@pytest.fixture
def catalog() -> ListCatalog:
    made = ListCatalog(EMBEDDER)
    made.put("river", RIVER)
    made.put("mill", MILL)
    return made


@pytest.fixture(params=["flat", "numpy"])
def retriever(request: pytest.FixtureRequest, catalog: ListCatalog, tmp_path: Path) -> Retriever:
    return Retriever(catalog, EMBEDDER, tmp_path / "vectors", request.param)


def texts(retriever: Retriever, question: str, k: int, neighbours: int = 0) -> list[str]:
    return [p.chunk.text for p in retriever.retrieve(question, k, neighbours=neighbours)]


def test_nearest_chunk_with_its_cosine(retriever: Retriever) -> None:
    (passage,) = retriever.retrieve("Which ferryman?", 1)
    assert passage.chunk.id == "river#2"
    assert passage.score == pytest.approx(0.5)  # one word shared of two and two


def test_documents_by_best_score_chunks_in_document_order(retriever: Retriever) -> None:
    # river river 1.0; river fell 0.71; the river rose 0.58
    assert texts(retriever, "river", 3) == ["river river", "the river rose", "river fell"]
    scores = [p.score for p in retriever.retrieve("river", 3)]
    np.testing.assert_allclose(scores, [1, 1 / 3**0.5, 1 / 2**0.5], atol=1e-6)


def test_ranked_is_strictly_by_score(retriever: Retriever, catalog: ListCatalog) -> None:
    # unlike retrieve, which keeps the chunks of a document together
    ranked = retriever.ranked("river", 3)
    assert [p.chunk.text for _, p in ranked] == ["river river", "river fell", "the river rose"]
    assert [catalog.chunk(row) for row, _ in ranked] == [p.chunk for _, p in ranked]
    assert retriever.ranked(EMBEDDER.embed(["river"])[0], 3) == ranked
    with pytest.raises(PromptError, match="nothing to search for"):
        retriever.ranked(" ", 3)


def test_neighbours_come_with_the_score_of_their_hit(retriever: Retriever) -> None:
    found = retriever.retrieve("apples", 1, neighbours=1)
    assert [p.chunk.text for p in found] == RIVER[2:5]
    assert {round(p.score, 5) for p in found} == {round(1 / 3**0.5, 5)}


def test_neighbours_are_not_repeated_and_hits_keep_their_score(retriever: Retriever) -> None:
    found = retriever.retrieve("river", 3, neighbours=3)
    assert [p.chunk.text for p in found] == [*MILL, *RIVER]
    expected = [1] * 3 + [3**-0.5, 2**-0.5, 2**-0.5, 2**-0.5, 2**-0.5]
    np.testing.assert_allclose([p.score for p in found], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "numpy"])
def test_filtered_search_is_that_of_the_documents_that_pass(kind: Kind, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = [f"word{n}" for n in range(60)]
    whole, part = ListCatalog(EMBEDDER), ListCatalog(EMBEDDER)
    for number in range(40):
        texts = [" ".join(generator.choice(words, 5)) for _ in range(3)]
        metadata = {"shelf": "abc"[number % 3], "year": str(2000 + number)}
        whole.put(f"d{number}", texts, **metadata)
        if number % 3 == 1 and number >= 15:
            part.put(f"d{number}", texts, **metadata)
    given = {"shelf": "b", "year": {"$gte": 2015}}
    all_of_it = Retriever(whole, EMBEDDER, tmp_path / "whole", kind)
    alone = Retriever(part, EMBEDDER, tmp_path / "part", kind)
    for question in words[:20]:
        assert all_of_it.retrieve(question, 5, neighbours=1, filter=given) == alone.retrieve(
            question, 5, neighbours=1
        )
        ranked = [passage for _, passage in all_of_it.ranked(question, 7, given)]
        assert ranked == [passage for _, passage in alone.ranked(question, 7)]
        hidden = all_of_it.retrieve(question, 100, without=["d16"], filter=given)
        assert {p.chunk.document for p in hidden} == set(part.metadata) - {"d16"}
    assert all_of_it.retrieve("word1", 5, filter={"shelf": "z"}) == []


def test_a_filter_sees_documents_that_were_changed(
    retriever: Retriever, catalog: ListCatalog
) -> None:
    given = {"shelf": "a"}
    assert retriever.retrieve("river", 9, filter=given) == []
    catalog.put("river", RIVER, shelf="a")
    assert {p.chunk.document for p in retriever.retrieve("river", 9, filter=given)} == {"river"}
    catalog.put("river", RIVER)
    assert retriever.retrieve("river", 9, filter=given) == []
    for number in range(200):  # more filters than are kept
        assert retriever.retrieve("river", 9, filter={"shelf": str(number)}) == []
    with pytest.raises(ConfigError, match=r"filter\.shelf\.\$of is no operator"):
        retriever.retrieve("river", 9, filter={"shelf": {"$of": 1}})


def test_words_and_vectors_find_together(retriever: Retriever, catalog: ListCatalog) -> None:
    catalog.put("codes", ["the part xk12 is blue", "the part xk13 is red"])

    def found(retrieval: Retrieval, k: int = 2) -> list[str]:
        return [p.chunk.id for p in retriever.retrieve("xk13 part", k, retrieval=retrieval)]

    assert found("bm25", 1) == found("dense", 1) == found("hybrid", 1) == ["codes#1"]
    assert found("bm25", 9) == found("hybrid") == ["codes#0", "codes#1"]  # in document order
    assert len(found("dense", 9)) == len(found("hybrid", 9)) == 9
    (best,) = retriever.retrieve("xk13 part", 1, retrieval="bm25")
    cosine = float(EMBEDDER.embed(["xk13 part"])[0] @ EMBEDDER.embed([best.chunk.text])[0])
    assert best.score == pytest.approx(cosine)
    catalog.drop("codes")
    assert found("bm25") == []
    assert found("hybrid") == found("dense") != []


@pytest.mark.parametrize("retrieval", ["bm25", "hybrid"])
def test_chunks_below_the_least_similarity_do_not_hide_those_above(
    retriever: Retriever, catalog: ListCatalog, retrieval: Retrieval
) -> None:
    long = [f"apples apples apples {' '.join(f'w{n}x{m}' for m in range(40))}" for n in range(300)]
    catalog.put("long", long)
    catalog.put("short", ["apples " + "of the far north " * 3])
    found = retriever.retrieve("apples", 1, retrieval=retrieval, min_score=0.5)
    assert [p.chunk.id for p in found] == ["river#3"]  # a boat of apples
    found = retriever.retrieve("apples", 9, retrieval="bm25", min_score=0.999)
    assert found == []


def test_ranks_are_fused() -> None:
    assert fused_ranks([[3, 1, 2]]) == [3, 1, 2]
    # 1/61 + 1/62 each, then 1/61; 1/63 twice is more than 1/61
    assert fused_ranks([[1, 2, 3], [2, 1, 3], [9]]) == [1, 2, 3, 9]
    assert fused_ranks([[1, 5], [7]]) == [1, 7, 5]
    assert fused_ranks([[], []]) == []


@pytest.mark.parametrize("retrieval", ["dense", "bm25", "hybrid"])
def test_all_that_is_selected_passes(retriever: Retriever, retrieval: Retrieval) -> None:
    def found(**options: Any) -> list[str]:
        passages = retriever.retrieve("river fell", 9, retrieval=retrieval, **options)
        return sorted(p.chunk.id for p in passages)

    assert found(min_score=0.6) == ["mill#2", "river#4"]
    assert found(min_score=0.99) == ["river#4"]
    assert found(min_score=0.6, without=["mill"]) == ["river#4"]
    assert found(min_score=-1) == found()
    assert found(mmr=1.0) == found()
    assert found(filter={"a": 1}) == []


def test_marginal_relevance_is_langchains() -> None:
    generator = np.random.default_rng(5)
    for relevance in (0.0, 0.3, 0.5, 1.0):
        vectors = generator.standard_normal((30, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        chosen = most_relevant_and_unlike(vectors[1:], vectors[0], relevance, 7)
        # LangChain's first choice is the most similar, whatever the relevance
        expected = maximal_marginal_relevance(vectors[0], list(vectors[1:]), relevance, 7)
        if relevance:
            assert chosen == expected
        assert len(set(chosen)) == 7
    assert most_relevant_and_unlike(vectors[:2], vectors[0], 0.5, 7) == [0, 1]


def test_marginal_relevance_prefers_what_is_new(retriever: Retriever, catalog: ListCatalog) -> None:
    catalog.put("copies", ["apples and apples"] * 3 + ["apples of the far north"])
    plain = [p.chunk.text for p in retriever.retrieve("apples", 2)]
    assert plain == ["apples and apples"] * 2
    unlike = [p.chunk.text for p in retriever.retrieve("apples", 2, mmr=0.4)]
    assert len(set(unlike)) == 2 and "apples and apples" in unlike


class Longest:
    """Texts are the more relevant the longer they are."""

    name = "longest"

    def __init__(self) -> None:
        self.read: list[str] = []

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        self.read = list(texts)
        return np.array([len(text) for text in texts], np.float32)


@pytest.mark.parametrize("retrieval", ["dense", "bm25", "hybrid"])
def test_the_reranker_chooses_among_the_best(
    catalog: ListCatalog, tmp_path: Path, retrieval: Retrieval
) -> None:
    longest = Longest()
    for number in range(9):
        catalog.put(f"d{number}", ["apples " * (9 - number) + "pears " * (number + 1)])
    made = Retriever(catalog, EMBEDDER, tmp_path / "vectors", reranker=longest)

    def found(k: int, **options: Any) -> list[str]:
        passages = made.retrieve("apples", k, retrieval=retrieval, **options)
        return [p.chunk.text for p in passages]

    plain = found(9)
    for most in (1, 3, 9):
        first = found(9, rerank=most)
        assert longest.read == plain[:most]
        assert first == sorted(plain[:most], key=len, reverse=True) + plain[most:]
    assert found(2, rerank=9) == sorted(plain, key=len, reverse=True)[:2]
    assert found(2) == plain[:2]
    unlike = found(2, rerank=4, mmr=0.5)
    assert unlike == sorted(longest.read, key=len, reverse=True)[:2] and len(longest.read) == 4
    assert found(1, rerank=9, min_score=1) == [] == longest.read
    (best,) = made.retrieve("apples", 1, retrieval=retrieval, rerank=9)
    cosine = float(EMBEDDER.embed(["apples"])[0] @ EMBEDDER.embed([best.chunk.text])[0])
    assert best.score == pytest.approx(cosine)


def test_a_chunk_that_goes_before_it_is_reranked_is_left_out(
    catalog: ListCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Retriever(catalog, EMBEDDER, tmp_path / "vectors", reranker=Longest())
    search = made._vectors.current().search

    def search_and_lose(queries: Vectors, k: int, among: Ids | None) -> object:
        found = search(queries, k, among)
        catalog.drop("mill")
        return found

    monkeypatch.setattr(made._vectors.current(), "search", search_and_lose)
    found = made.retrieve("river", 3, rerank=3)
    assert [p.chunk.text for p in found] == ["the river rose", "river fell"]


def test_as_many_chunks_as_there_is_room_for(catalog: ListCatalog, tmp_path: Path) -> None:
    made = Retriever(
        catalog, EMBEDDER, tmp_path / "vectors", count_tokens=lambda text: len(text.split())
    )

    def found(tokens: int, neighbours: int = 0, k: int = 9) -> list[str]:
        passages = made.retrieve("river fell", k, top_tokens=tokens, neighbours=neighbours)
        return [p.chunk.id for p in passages]

    assert found(1) == []  # the best has two words
    assert found(2) == ["river#4"] and found(3) == ["river#4"]
    assert found(4) == ["river#4", "mill#2"]
    assert found(7) == ["river#0", "river#4", "mill#2"]
    assert found(7, k=2) == ["river#4", "mill#2"]
    assert found(10**6) == [p.chunk.id for p in made.retrieve("river fell", 9)]
    # with its neighbour, a boat of apples, and without, where there is no room for both
    assert found(6, neighbours=1) == ["river#3", "river#4"]
    assert found(4, neighbours=1) == ["river#4", "mill#2"]
    assert found(7, neighbours=1) == ["river#3", "river#4", "mill#2"]
    for tokens in range(1, 40):
        for neighbours in range(3):
            names = found(tokens, neighbours)
            texts = [made.catalog.chunk(made.catalog.rows_of(n[:-2])[int(n[-1])]) for n in names]
            assert sum(len(chunk.text.split()) for chunk in texts) <= tokens
            assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retrieval": "sparse"}, "retrieval is 'sparse': choose one of dense, bm25, hybrid"),
        ({"min_score": 1.5}, "min_score is 1.5: it is a number from -1 to 1"),
        ({"min_score": float("nan")}, "min_score is nan"),
        ({"mmr": -0.1}, "mmr is -0.1: it is a number from 0 to 1"),
        ({"mmr": "0.5"}, "mmr is '0.5': it is a number from 0 to 1"),
        ({"min_score": True}, "min_score is True"),
        ({"rerank": -1}, "rerank is -1: it is a whole number from 0 on"),
        ({"rerank": None}, "rerank is None"),
        ({"rerank": 5}, "rerank is 5, and there is no reranker: set reranker to the name"),
        ({"top_tokens": 0}, "top_tokens is 0: it is a whole number from 1 on"),
        ({"top_tokens": 2.5}, "top_tokens is 2.5"),
        ({"top_tokens": 9}, "top_tokens needs a retriever that has count_tokens"),
    ],
)
def test_options_out_of_range_are_refused(
    retriever: Retriever, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        retriever.retrieve("river", 1, **options)


def test_more_than_there_is(retriever: Retriever) -> None:
    assert texts(retriever, "mill", 100) == [*MILL, *RIVER]


def test_equal_scores_follow_the_catalog(retriever: Retriever) -> None:
    assert texts(retriever, "zebra", 2) == RIVER[:2]


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_empty_question(retriever: Retriever, question: str) -> None:
    with pytest.raises(PromptError, match="The question is empty"):
        retriever.retrieve(question, 1)


def test_impossible_numbers(retriever: Retriever) -> None:
    with pytest.raises(ConfigError, match="^k is 0: ask for at least 1 chunk"):
        retriever.retrieve("river", 0)
    with pytest.raises(ConfigError, match="neighbours is -1"):
        retriever.retrieve("river", 1, neighbours=-1)


def test_empty_catalog(tmp_path: Path) -> None:
    assert Retriever(ListCatalog(), HashEmbedder(), tmp_path / "v").retrieve("river", 3) == []


def test_unknown_kind(catalog: ListCatalog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'faiss', of which .*: choose one of auto, flat, numpy"):
        Retriever(catalog, EMBEDDER, tmp_path / "v", "faiss")


def test_embedder_of_another_dimension(catalog: ListCatalog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4096 dimensions, those of hash-64 64"):
        Retriever(catalog, HashEmbedder(64), tmp_path / "v")


def test_saved_index_is_used_again(
    catalog: ListCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Retriever(catalog, EMBEDDER, tmp_path / "v")
    monkeypatch.setattr(catalog, "vectors", None)  # not even asked for
    again = Retriever(catalog, EMBEDDER, tmp_path / "v")
    assert again.retrieve("river", 3) == first.retrieve("river", 3)


@pytest.mark.parametrize("damage", ["flip", "cut", "old", "kind"])
def test_unusable_index_is_rebuilt_and_said_so(
    catalog: ListCatalog, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "v"
    expected = Retriever(catalog, EMBEDDER, path).retrieve("river", 3)
    raw = path.read_bytes()
    kind: Kind = "numpy" if damage == "kind" else "flat"
    if damage == "flip":
        path.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "old":
        catalog.generation += 1
    with caplog.at_level(logging.INFO, "ragcache.retriever.current_index"):
        again = Retriever(catalog, EMBEDDER, path, kind)
        assert again.retrieve("river", 3) == expected
        assert "v is rebuilt from the catalog: it" in caplog.text
        caplog.clear()
        Retriever(catalog, EMBEDDER, path, kind)  # the rebuilt index was saved
        assert caplog.text == ""


def test_changes_are_found_at_once(retriever: Retriever, catalog: ListCatalog) -> None:
    catalog.put("river", ["nothing here"])
    assert texts(retriever, "river", 1) == ["river river"]
    catalog.drop("mill")
    assert texts(retriever, "river", 5) == ["nothing here"]
    catalog.drop("river")
    assert retriever.retrieve("river", 5) == []


def test_refresh_saves(retriever: Retriever, catalog: ListCatalog, tmp_path: Path) -> None:
    assert retriever.refresh() is False
    catalog.put("new", ["zebra"])
    before = (tmp_path / "vectors").read_bytes()
    assert retriever.refresh() is True
    assert retriever.generation == catalog.generation and len(retriever) == 9
    assert (tmp_path / "vectors").read_bytes() != before


def test_index_that_cannot_be_written_is_only_logged(
    catalog: ListCatalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Retriever(catalog, EMBEDDER, tmp_path / "no" / "such" / "folder")
    assert "cannot be written (No such file or directory)" in caplog.text
    assert texts(made, "apples", 1) == ["boat of apples"]


def test_chunk_that_goes_during_a_search_is_left_out(
    retriever: Retriever, catalog: ListCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = retriever._vectors.current().search

    def search_and_lose(queries: Vectors, k: int, among: Ids | None) -> object:
        found = search(queries, k, among)
        catalog.drop("mill")
        return found

    monkeypatch.setattr(retriever._vectors.current(), "search", search_and_lose)
    assert texts(retriever, "river", 3) == ["the river rose", "river fell"]


def test_embedder_with_a_way_of_its_own_for_questions(catalog: ListCatalog, tmp_path: Path) -> None:
    class Contrary(HashEmbedder):
        def embed_question(self, question: str) -> Vectors:
            row: Vectors = self.embed(["apples"])[0]
            return row

    made = Retriever(catalog, Contrary(4096), tmp_path / "v")
    assert texts(made, "bridge", 1) == ["boat of apples"]


def test_threads_may_retrieve_while_the_catalog_changes(
    retriever: Retriever, catalog: ListCatalog
) -> None:
    def ask(_: int) -> bool:
        return texts(retriever, "apples", 1) == ["boat of apples"]

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(ask, range(200))
        for number in range(20):
            catalog.put(f"extra {number}", ["zebra"])
        assert all(answers)
