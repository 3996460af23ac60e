"""Any number of documents is added a portion at a time, and a second run does what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ragcache.core import portions
from ragcache.errors import SourceError
from ragcache.store.catalog.catalog import DocumentToPut
from ragcache.types import Document
from tests import scene

DOCUMENTS = [
    Document(f"d{n:02}", f"Note {n}. The mill grinds apple number {n}.") for n in range(23)
]


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "_DOCUMENTS", 5)


def test_portions_depend_on_the_documents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(some) for some in portions.portions(DOCUMENTS)] == [5, 5, 5, 5, 3]
    monkeypatch.setattr(portions, "_CHARACTERS", 60)
    assert [len(some) for some in portions.portions(DOCUMENTS[:5])] == [2, 2, 1]
    assert list(portions.portions([])) == []


def test_no_more_than_a_portion_is_held(tmp_path: Path) -> None:
    with scene.small(tmp_path / "store") as cache:

        def documents() -> Iterator[Document]:
            for number, document in enumerate(DOCUMENTS):
                assert number - cache.catalog.size[0] < 5
                yield document

        before, after = list[int](), list[int]()
        added = cache.add_stream(
            documents(),
            before=lambda some: before.append(len(some)),
            after=lambda: after.append(cache.catalog.size[0]),
        )
        assert before == [5, 5, 5, 5, 3] and after == [5, 10, 15, 20, 23]
        assert (added.documents, added.unchanged) == (23, 0)
        usable, stored = cache.usable()
        assert usable == stored > 23  # equal chunks count once
        assert cache.retrieve("apple number 17", top_k=1)[0].chunk.document == "d17"


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield from DOCUMENTS[:12]
        raise SourceError("the rest cannot be read. Try again.")

    with scene.small(tmp_path / "whole") as cache:
        whole = cache.add_stream(DOCUMENTS)
    with scene.small(tmp_path / "store") as cache:
        with pytest.raises(SourceError, match="the rest cannot be read"):
            cache.add_stream(failing())
        assert cache.catalog.size[0] == 10
        rest = cache.add_stream(DOCUMENTS)
        assert (rest.documents, rest.unchanged) == (13, 10)
        assert 0 < rest.precomputed.encoded < whole.precomputed.encoded
        again = cache.add_stream(DOCUMENTS)
        assert (again.documents, again.unchanged) == (0, 23)
        assert again.precomputed.encoded == 0


def test_documents_of_a_batch_are_one_commit_and_vectors_are_indexed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene.small(tmp_path / "store") as cache:
        commits, refreshed = list[int](), list[bool]()
        put, refresh = cache.catalog.put_documents, cache.retriever.refresh

        def counted(given: Sequence[DocumentToPut], *, promise: int | None = None) -> list[str]:
            commits.append(len(given))
            return put(given, promise=promise)

        def also_counted() -> bool:
            refreshed.append(True)
            return refresh()

        monkeypatch.setattr(cache.catalog, "put_documents", counted)
        monkeypatch.setattr(cache.retriever, "refresh", also_counted)
        cache.add_stream(DOCUMENTS)
        assert commits == [5, 5, 5, 5, 3] and len(refreshed) == 1


def test_an_id_of_an_earlier_portion_is_refused(tmp_path: Path) -> None:
    with scene.small(tmp_path / "store") as cache:
        with pytest.raises(SourceError, match="the id 'd00' is given to several documents"):
            cache.add_stream([*DOCUMENTS[:7], DOCUMENTS[0]])
        assert cache.catalog.size[0] == 5
