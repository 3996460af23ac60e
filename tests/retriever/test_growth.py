"""An index that follows a catalog as it grows: built in a thread, switched, saved, opened again."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ragcache.errors import ConfigError, StoreError
from ragcache.retriever import current_index, index_kind
from ragcache.retriever.approximate_index import ApproximateIndex
from ragcache.retriever.base_index import BaseIndex
from ragcache.retriever.current_index import CurrentIndex
from ragcache.retriever.embed import HashEmbedder
from ragcache.retriever.index import NumpyIndex, Vectors
from ragcache.retriever.index_build import build
from ragcache.retriever.index_description import describe_index
from ragcache.retriever.search import Retriever
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.testing.index import DIMENSION
from ragcache.types import Chunk, Document
from tests.pages import ROOT
from tests.retriever.conftest import ListCatalog, VectorCatalog, clustered


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Approximate indexes from 500 vectors on; auto changes at 1,000 and 2,000."""
    monkeypatch.setattr(index_kind, "LEAST_APPROXIMATE", 500)
    monkeypatch.setattr(index_kind, "_AUTO", {"flat": 1000, "hnsw": 2000, "ivfpq": 10**9})


def current(
    catalog: VectorCatalog, folder: Path, setting: str = "auto", may_save: bool = True
) -> CurrentIndex:
    return CurrentIndex(
        catalog,
        *(DIMENSION, folder / "vectors", setting),
        recall=0.95,
        embedder="e",
        may_save=lambda: may_save,
    )


def assert_finds_all(index: CurrentIndex, catalog: VectorCatalog, rows: list[int]) -> None:
    """Every one of these rows is the nearest to its own vector, and no other is found."""
    found = index.current().search(catalog.vectors_of(rows), 1)[1][:, 0]
    assert found.tolist() == rows


def base_of(index: CurrentIndex) -> object:
    found = index.current()
    assert isinstance(found, ApproximateIndex)
    return found.base


def test_kinds_change_as_the_catalog_grows(tmp_path: Path) -> None:
    catalog = VectorCatalog(clustered(900))
    index = current(catalog, tmp_path)
    kinds = [index.description.kind]
    for seed, n in ((1, 200), (2, 1000), (3, 100)):
        new = catalog.add(clustered(n, seed=seed))
        assert index.refresh()
        assert_finds_all(index, catalog, [0, new[0], new[-1]])
        index.finish()
        kinds.append(index.description.kind)
        assert_finds_all(index, catalog, [0, *new[:5], new[-1]])
        assert describe_index(tmp_path / "vectors") == index.description
        assert len(index) == len(catalog.by_row) and index.generation == catalog.generation
    assert kinds == ["flat", "hnsw", "ivfpq", "ivfpq"]
    catalog.delete(range(0, 2200, 2))  # 1,100 are left: more than half of what the kind begins at
    index.refresh()
    index.finish()
    assert index.description.kind == "ivfpq"
    catalog.delete(range(0, 2200, 3))
    index.refresh()
    index.finish()
    assert index.description.kind == "hnsw"
    catalog.delete(range(0, 1900))
    assert index.refresh() and index.description.kind == "flat"
    assert_finds_all(index, catalog, sorted(catalog.by_row)[:5])
    index.close()


def test_a_worn_index_is_built_again_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go, built = threading.Event(), []

    def slowly(*arguments: object) -> BaseIndex:
        built.append(threading.current_thread().name)
        assert may_go.wait(10)
        return build(*arguments)  # type: ignore[arg-type]

    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path)
    first = base_of(index)
    monkeypatch.setattr(current_index, "build", slowly)
    catalog.add(clustered(150, seed=1))  # a tenth
    index.refresh()
    assert not built
    catalog.add(clustered(1, seed=2))
    index.refresh()
    catalog.delete(range(0, 100))
    new = catalog.add(clustered(30, seed=3))
    index.refresh()  # no second build
    assert_finds_all(index, catalog, [*new])  # while the build waits, the old one answers
    assert base_of(index) is first
    saved = (tmp_path / "vectors").read_bytes()
    may_go.set()
    index.finish()
    assert built == ["index"] and base_of(index) is not first
    assert (tmp_path / "vectors").read_bytes() != saved
    assert_finds_all(index, catalog, [200, *new])
    catalog.delete(range(100, 300))  # more than a tenth
    index.refresh()
    index.finish()
    assert len(built) == 2


def test_a_saved_index_is_used_with_what_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = VectorCatalog(clustered(1500))
    current(catalog, tmp_path)
    new = catalog.add(clustered(20, seed=1))
    monkeypatch.setattr(current_index, "build", None)
    with caplog.at_level(logging.INFO, "ragcache.retriever.current_index"):
        index = current(catalog, tmp_path)
    assert caplog.text == ""
    assert_finds_all(index, catalog, [3, *new])
    assert len(index.current()) == 1520


@pytest.mark.parametrize("damage", ["flip", "cut", "kind", "gone"])
def test_an_unusable_file_is_built_again_and_said(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, catalog = tmp_path / "vectors", VectorCatalog(clustered(1500))
    current(catalog, tmp_path)
    raw = path.read_bytes()
    if damage == "flip":
        path.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "kind":
        NumpyIndex(DIMENSION).save(path, catalog.generation)
    else:
        path.unlink()
    with caplog.at_level(logging.INFO, "ragcache.retriever.current_index"):
        index = current(catalog, tmp_path)
        assert "vectors is rebuilt from the catalog: it" in caplog.text
        assert_finds_all(index, catalog, [0, 700, 1499])
        caplog.clear()
        current(catalog, tmp_path)
        assert caplog.text == ""


def test_another_setting_is_built_while_the_saved_index_answers(tmp_path: Path) -> None:
    catalog = VectorCatalog(clustered(1500))
    current(catalog, tmp_path, "hnsw")
    index = current(catalog, tmp_path, "IVF16,Flat")
    assert_finds_all(index, catalog, [0, 700, 1499])
    index.finish()
    assert index.description.kind == "IVF16,Flat"
    assert_finds_all(index, catalog, [0, 700, 1499])
    assert current(catalog, tmp_path, "flat").description.kind == "flat"
    assert current(catalog, tmp_path, "numpy").description.kind == "numpy"


def test_a_build_that_fails_is_said_and_the_old_index_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path)

    def fail(*arguments: object) -> BaseIndex:
        raise MemoryError("no room")

    monkeypatch.setattr(current_index, "build", fail)
    for seed in (1, 2):
        new = catalog.add(clustered(200, seed=seed))
        index.refresh()
        index.finish()
        assert_finds_all(index, catalog, [0, *new])
    assert caplog.text.count("No hnsw index could be built (no room): the one from before") == 1


def test_closing_stops_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path)
    before, kept = base_of(index), (tmp_path / "vectors").read_bytes()
    reading = threading.Event()
    after = catalog.vectors_after

    def slowly(row: int, most: int) -> object:
        if threading.current_thread().name == "index":
            reading.set()
            time.sleep(0.05)
        return after(row, min(most, 10))

    monkeypatch.setattr(catalog, "vectors_after", slowly)
    catalog.add(clustered(200, seed=1))
    index.refresh()
    assert reading.wait(10)
    began = time.perf_counter()
    index.close()
    assert time.perf_counter() - began < 2
    assert base_of(index) is before and (tmp_path / "vectors").read_bytes() == kept
    catalog.add(clustered(200, seed=2))
    index.refresh()
    assert_finds_all(index, catalog, [1701])


def test_what_cannot_be_stopped_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path)
    go = threading.Event()

    def trains(*arguments: object) -> BaseIndex:
        assert go.wait(10)
        raise StoreError("the store is closed: open it again")

    monkeypatch.setattr(current_index, "build", trains)
    monkeypatch.setattr(current_index, "_PATIENCE_S", 0.05)
    catalog.add(clustered(200, seed=1))
    index.refresh()
    index.close()
    assert index.is_building
    go.set()
    index.finish()
    assert not index.is_building and caplog.text == ""


def test_a_process_that_may_not_write_does_not(tmp_path: Path) -> None:
    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path, may_save=False)
    assert_finds_all(index, catalog, [0])
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_and_vectors(tmp_path: Path) -> None:
    catalog = VectorCatalog(clustered(1500))
    with pytest.raises(ConfigError, match="index is 'hsnw', of which FAISS makes no index"):
        current(catalog, tmp_path, "hsnw")
    with pytest.raises(ConfigError, match="have 24 dimensions, those of hash-64 64"):
        Retriever(catalog, HashEmbedder(64), tmp_path / "v", "hnsw")
    index = current(catalog, tmp_path)
    catalog.add(np.full((1, DIMENSION), np.nan, np.float32))
    with pytest.raises(ValueError, match="a vector is not finite"):
        index.refresh()


def test_nothing_is_lost_while_documents_change_and_indexes_are_built(tmp_path: Path) -> None:
    catalog = VectorCatalog(clustered(1500))
    index = current(catalog, tmp_path)
    stays = list(range(0, 1500, 100))
    wrong: list[object] = []
    added = [1499]
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            try:
                assert_finds_all(index, catalog, stays)
                last = added[-1]  # is found at once
                found = index.current().search(catalog.vectors_of([last]), 1)[1][0, 0]
                assert found == last
                time.sleep(0.003)
            except Exception as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    bases = []
    for seed in range(6):
        new = catalog.add(clustered(130, seed=100 + seed))
        added.append(new[-1])
        catalog.delete({*new[:100:2], *range(seed, 1500, 25)} - {*stays})
        bases.append(base_of(index))
        if seed % 2:
            index.finish()
    done.set()
    for thread in threads:
        thread.join()
    index.finish()
    assert wrong == [] and len({*map(id, bases)}) > 1
    assert_finds_all(index, catalog, sorted(catalog.by_row)[:: len(catalog.by_row) // 50])
    index.close()


def test_a_retriever_finds_the_same_through_an_approximate_index(tmp_path: Path) -> None:
    embedder = HashEmbedder(256)
    words = [f"word{n}" for n in range(80)]
    generator = np.random.default_rng(0)
    catalog = ListCatalog(embedder)
    for number in range(300):
        texts = [" ".join(generator.choice(words, 6)) for _ in range(2)]
        catalog.put(f"d{number}", texts, shelf="ab"[number % 2])
    exact = Retriever(catalog, embedder, tmp_path / "exact", "flat")
    close = Retriever(catalog, embedder, tmp_path / "close", "HNSW16", index_recall=1.0)
    assert close.index.kind == "HNSW16" and close.index.recall > 0.99
    same = 0
    for question in (" ".join(generator.choice(words, 3)) for _ in range(30)):
        assert close.retrieve(question, 5, filter={"shelf": "a"}) == exact.retrieve(
            question, 5, filter={"shelf": "a"}
        )
        same += close.retrieve(question, 3) == exact.retrieve(question, 3)
    assert same >= 27
    catalog.put("d7", ["zebra"])
    assert [p.chunk.text for p in close.retrieve("zebra", 1, neighbours=0)] == ["zebra"]
    catalog.drop("d7")
    assert all(p.chunk.document != "d7" for p in close.retrieve("zebra", 600))
    close.close()


def put(catalog: Catalog, name: str, vectors: Vectors) -> list[int]:
    chunks = [Chunk(name, number, f"{name} {number}") for number in range(len(vectors))]
    catalog.put_document(Document(name, ""), chunks, vectors, b"digest")
    return catalog.rows_of(name)


def test_the_catalog_of_a_store_is_followed(tmp_path: Path) -> None:
    def current() -> CurrentIndex:
        return CurrentIndex(
            catalog, DIMENSION, path, "hnsw", recall=0.9, embedder="e", may_save=lambda: True
        )

    path = tmp_path / "vectors"
    with DiskStore(tmp_path / "store") as store:
        catalog = Catalog(store)
        put(catalog, "a", clustered(900))
        index = current()
        put(catalog, "b", clustered(200, seed=1))
        assert index.refresh() and index.is_building
        index.finish()
        assert describe_index(path) == index.description
        assert index.description.vectors == 1100
        rows = put(catalog, "b", clustered(50, seed=2))
        found = index.current().search(clustered(50, seed=2), 1)[1][:, 0]
        assert found.tolist() == rows
        put(catalog, "c", clustered(300, seed=3))
        index.refresh()
        index.close()
    with DiskStore(tmp_path / "store") as store:
        catalog = Catalog(store)
        index = current()
        assert index.current().search(clustered(50, seed=2), 1)[1][:, 0].tolist() == rows
        catalog.delete_document("a")
        index.refresh()
        assert set(index.current().search(clustered(1), 400)[1][0].tolist()) == {*catalog.rows()}
        index.close()


KILLED = """
import sys
from pathlib import Path
import numpy as np
from ragcache.retriever import index_kind
from ragcache.retriever.current_index import CurrentIndex
from tests.retriever.conftest import VectorCatalog, clustered

index_kind.LEAST_APPROXIMATE = 100
catalog = VectorCatalog(clustered(600))
index = CurrentIndex(
    catalog, 24, Path(sys.argv[1]), "hnsw", recall=0.9, embedder="e", may_save=lambda: True
)
print("ready", flush=True)
for seed in range(1, 100000):
    catalog.delete([*catalog.by_row][:100])
    catalog.add(clustered(100, seed=seed))
    index.refresh()
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_index(tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    generator = np.random.default_rng()
    command = [sys.executable, "-c", KILLED, str(path)]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        # The file is whole, and is that of a catalog after so many changes.
        catalog = VectorCatalog(clustered(600))
        found = describe_index(path)
        assert found is not None and found.kind == "hnsw" and found.vectors == 600
        seed = 0
        base, reason = BaseIndex.load(path, catalog, DIMENSION)
        while base is None and reason.startswith("it is of a later generation"):
            seed += 1
            catalog.delete([*catalog.by_row][:100])
            catalog.add(clustered(100, seed=seed))
            base, reason = BaseIndex.load(path, catalog, DIMENSION)
        assert base is not None, reason


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / ".vectors.a.tmp", tmp_path / ".vectors.b.tmp"
    for left in (old, new):
        left.write_bytes(b"half an index")
    os.utime(old, (0, 0))
    current(VectorCatalog(clustered(10)), tmp_path)
    assert new.exists() and not old.exists()
