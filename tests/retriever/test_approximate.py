"""Approximate indexes against the plain one: exact scores, exact filters, and enough recall."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from ragcache.errors import ConfigError
from ragcache.retriever import (
    approximate_index,
    base_index,
    gpu_copy,
    index_build,
    index_description,
)
from ragcache.retriever.approximate_index import ApproximateIndex, ExactBase
from ragcache.retriever.base_index import BaseIndex
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.fresh_rows import FreshRows
from ragcache.retriever.index import Ids, NumpyIndex, Vectors
from ragcache.retriever.index_build import BuildStopped, build
from ragcache.retriever.index_description import IndexDescription, describe_index
from ragcache.retriever.index_kind import check_setting, chosen_kind, made
from ragcache.retriever.recall import RecallSample
from ragcache.testing.index import DIMENSION, assert_same, filled
from tests.retriever.conftest import VectorCatalog, clustered

KINDS = [
    "hnsw",
    "ivfpq",
    "IVF16,SQ8",
    "PCA12,IVF16,SQ8",
    "IVF16,PQ4np,RFlat",
    "PQ6x4np",
    "HNSW8",
]


def plain(catalog: VectorCatalog) -> NumpyIndex:
    index = NumpyIndex(DIMENSION)
    index.add(*catalog.vectors())
    return index


def over(catalog: VectorCatalog, kind: str = "hnsw", floor: float = 0.9) -> ApproximateIndex:
    base = build(catalog, DIMENSION, kind, floor)
    return ApproximateIndex.over(base, catalog, DIMENSION)


def found_of(index: Any, other: Any, queries: Vectors, k: int = 10) -> float:
    """The share of what ``other`` finds that ``index`` finds, too."""
    mine, theirs = index.search(queries, k)[1], other.search(queries, k)[1]
    pairs = zip(mine.tolist(), theirs.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


@pytest.fixture(scope="module")
def catalog() -> VectorCatalog:
    return VectorCatalog(clustered(3000))


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, catalog: VectorCatalog) -> BaseIndex:
    return build(catalog, DIMENSION, request.param, 0.9)


def test_scores_are_exact_and_few_are_missed(base: BaseIndex, catalog: VectorCatalog) -> None:
    index, exact = ApproximateIndex.over(base, catalog, DIMENSION), plain(catalog)
    queries = clustered(50, seed=1)
    scores, ids = index.search(queries, 10)
    assert scores.dtype == np.float32 and ids.dtype == np.int64 and ids.shape == (50, 10)
    assert found_of(index, exact, queries) > 0.85
    for query, each, rows in zip(queries, scores, ids, strict=True):
        expected, order = exact.search(query[None], 10, rows)
        np.testing.assert_array_equal(rows, order[0])
        np.testing.assert_array_equal(each, expected[0])


@pytest.mark.parametrize("k", [800, 5000])
def test_a_wide_search_equals_the_plain_index(
    base: BaseIndex, catalog: VectorCatalog, k: int
) -> None:
    index = ApproximateIndex.over(base, catalog, DIMENSION)
    queries = clustered(3, seed=1)
    for mine, exact in zip(
        index.search(queries, k), plain(catalog).search(queries, k), strict=True
    ):
        np.testing.assert_array_equal(mine, exact)


@pytest.mark.parametrize("few", [7, 10_000])
def test_a_search_among_rows_is_exact(
    base: BaseIndex, catalog: VectorCatalog, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate_index, "_FEW", few)
    monkeypatch.setattr(approximate_index, "_BLOCK", 1000)
    index, exact = ApproximateIndex.over(base, catalog, DIMENSION), plain(catalog)
    queries = clustered(5, seed=2)
    for among in ([], [7], [5000, 7, 7], np.arange(0, 3000, 40), np.arange(2999)[::-1]):
        for mine, theirs in zip(
            index.search(queries, 9, among), exact.search(queries, 9, among), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["hnsw", "HNSW8", "flat", "fresh"])
def test_near_ties_among_rows_are_ordered_by_exact_score(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate_index, "_FEW", 7)
    generator = np.random.default_rng(4)
    near = clustered(1) + 1e-5 * generator.standard_normal((900, DIMENSION))
    near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    catalog = VectorCatalog(near)
    if kind == "fresh":  # rows that came after the index was built
        none = build(VectorCatalog(near[:0]), DIMENSION, "hnsw", 0.9)
        index = ApproximateIndex.over(none, catalog, DIMENSION)
        assert len(index.fresh) == 900
    elif kind == "flat":
        flat = FaissIndex(DIMENSION)
        flat.add(*catalog.vectors())
        index = ApproximateIndex.over(ExactBase(flat, "flat"), catalog, DIMENSION)
    else:
        index = over(catalog, kind)
        assert index.base.error is not None
    catalog.delete(range(0, 900, 9))
    among = np.arange(0, 900, 2)
    for k in (1, 20, 300, 900):
        both = index.search(near[:3], k, among), plain(catalog).search(near[:3], k, among)
        for mine, exact in zip(*both, strict=True):
            np.testing.assert_array_equal(mine, exact)


@pytest.mark.parametrize("kind", ["hnsw", "HNSW8"])
def test_rough_scores_differ_by_no_more_than_they_say(kind: str) -> None:
    vectors = np.concatenate([clustered(300), 1e-6 * clustered(300, seed=1)])
    catalog = VectorCatalog(vectors)
    base, exact = build(catalog, DIMENSION, kind, 0.9), plain(catalog)
    assert base.error is not None and base.error < 1e-3
    for query in clustered(20, seed=2):
        scores, rows = base.rough(query, 600, catalog.rows())
        ordered, order = exact.search(query[None], 600)
        there = dict(zip(order[0].tolist(), ordered[0].tolist(), strict=True))
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            assert abs(there[row] - score) <= base.error


def test_a_row_that_comes_after_it_was_asked_for_is_found() -> None:
    catalog = VectorCatalog(clustered(600))
    index = over(catalog)
    vectors = clustered(1, seed=3)
    assert index.search(vectors, 1, [600])[1].shape == (1, 0)
    catalog.add(vectors)
    assert index.extended().search(vectors, 1)[1].tolist() == [[600]]


def test_added_rows_are_found_and_deleted_ones_are_not(base: BaseIndex) -> None:
    vectors = clustered(3000)
    catalog = VectorCatalog(vectors)
    index = ApproximateIndex.over(base, catalog, DIMENSION)
    new = catalog.add(clustered(200, seed=4))
    index = index.extended()
    assert not index.is_worn
    np.testing.assert_array_equal(index.search(clustered(200, seed=4), 1)[1][:, 0], new)
    # All that is near one query, and half of what is new, is deleted without the index knowing.
    near = plain(catalog).search(vectors[:1], 400)[1][0]
    catalog.delete([*near.tolist(), *new[::2]])
    scores, ids = index.search(vectors[:1], 10)
    np.testing.assert_array_equal(ids[0], plain(catalog).search(vectors[:1], 10)[1][0])
    assert index.gone and not index.gone & set(catalog.by_row)
    assert index.is_worn and len(index) == len(catalog.by_row)
    catalog.delete(catalog.by_row)
    assert index.search(vectors[:2], 10)[1].shape == (2, 0)


def test_extending_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = VectorCatalog(clustered(600))
    index = over(catalog)
    read: list[int] = []
    after = catalog.vectors_after

    def noted(row: int, most: int) -> tuple[Ids, Vectors]:
        rows, vectors = after(row, most)
        read.extend(rows.tolist())
        return rows, vectors

    monkeypatch.setattr(catalog, "vectors_after", noted)
    monkeypatch.setattr(catalog, "vectors", None)
    monkeypatch.setattr(catalog, "rows", None)
    for _ in range(3):
        new = catalog.add(clustered(5, seed=7))
        index = index.extended()
        assert read == [*new]
        read.clear()
    assert index.extended().fresh.rows.tolist() == [*range(600, 615)]


def test_an_exact_base_misses_nothing() -> None:
    catalog = VectorCatalog(clustered(600))
    flat = FaissIndex(DIMENSION)
    flat.add(*catalog.vectors())
    catalog.add(clustered(50, seed=5))
    catalog.delete(range(0, 600, 7))
    index = ApproximateIndex.over(ExactBase(flat, "flat"), catalog, DIMENSION)
    for k in (1, 10, 100):
        for mine, exact in zip(
            index.search(clustered(9, seed=6), k),
            plain(catalog).search(clustered(9, seed=6), k),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, exact)


def test_equal_vectors_go_to_the_smaller_row() -> None:
    vectors = clustered(1500)
    vectors[700:715] = vectors[3]
    catalog = VectorCatalog(vectors)
    catalog.add(np.repeat(vectors[3:4], 3, axis=0))
    _, ids = over(catalog).search(vectors[3:4], 12)
    assert ids[0].tolist() == [3, *range(700, 711)]


def test_bad_searches_are_refused(catalog: VectorCatalog) -> None:
    index = over(VectorCatalog(clustered(500)))
    with pytest.raises(ConfigError, match="^k is 0: ask for at least 1"):
        index.search(np.zeros((1, DIMENSION)), 0)
    with pytest.raises(ValueError, match=r"vectors of shape \(1, 3\)"):
        index.search(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((1, DIMENSION), np.nan), 1)


def test_fresh_rows_share_memory_and_do_not_change() -> None:
    vectors = clustered(300)
    states, at = [FreshRows(DIMENSION)], 0
    while at < 300:
        step = 1 + at // 3
        rows = np.arange(at, min(300, at + step))
        states.append(states[-1].extended(rows, vectors[rows]))
        at += step
    for state in states:
        assert state.rows.tolist() == [*range(len(state))]
        for k in (1, 10, 400) if len(state) else ():
            best = np.argsort(-(vectors[: len(state)] @ vectors[250]))[:k]
            assert set(state.rough(vectors[250], k, state.rows)[1].tolist()) == set(best.tolist())
    assert len({id(state._vectors) for state in states}) < 12


# Building


def test_recall_is_the_share_that_is_found(base: BaseIndex, catalog: VectorCatalog) -> None:
    queries = clustered(200, seed=9)
    sample = RecallSample(queries)
    for at in range(0, 3000, 700):
        sample.see(catalog.vectors()[1][at : at + 700])
    nearest = plain(catalog).search(queries, 10)
    np.testing.assert_allclose(-np.sort(-sample.nearest), nearest[0], atol=1e-6)
    shares = [
        len({*base.candidates(query, 10).tolist()} & {*ids}) / 10
        for query, ids in zip(queries, nearest[1].tolist(), strict=True)
    ]
    recall = sample.recall(catalog, base.candidates)
    assert recall == pytest.approx(np.mean(shares), abs=0.002)
    # That of vectors which were held back is that of new ones, as far as 200 queries tell.
    assert base.description.recall == pytest.approx(recall, abs=0.04)
    assert base.description.measured is not None and len(base) == base.description.vectors == 3000
    np.testing.assert_array_equal(base.rows, np.arange(3000))


def test_the_search_is_widened_until_the_floor() -> None:
    catalog = VectorCatalog(clustered(2000, clusters=2000))
    floors = 0.05, 0.8, 0.95, 0.99
    bases = [build(catalog, DIMENSION, "IVF128,PQ2x6np", floor) for floor in floors]
    widths = [each.description.width or 0 for each in bases]
    assert widths == sorted(widths) and widths[0] == 1 and widths[-1] > 2
    assert all(b.description.recall >= f for b, f in zip(bases, floors, strict=True))
    narrow, wide = (ApproximateIndex.over(b, catalog, DIMENSION) for b in (bases[0], bases[-1]))
    queries = clustered(40, seed=8, clusters=2000)
    assert found_of(narrow, plain(catalog), queries) < found_of(wide, plain(catalog), queries)


def test_a_floor_that_is_not_reached_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_build, "_WIDEST", 2)
    monkeypatch.setattr(base_index, "_CANDIDATES", 1)
    base = build(VectorCatalog(clustered(2000)), DIMENSION, "PQ2x4np", 0.99)
    assert base.description.width == 2 and base.description.is_below_floor
    assert "The index PQ2x4np finds" in caplog.text and "index_recall (99.0 %)" in caplog.text


def test_copies_of_a_vector_count_as_found() -> None:
    vectors = np.repeat(clustered(20), 100, axis=0)  # of a hundred copies, any ten are the nearest
    assert build(VectorCatalog(vectors), DIMENSION, "hnsw", 0.98).description.recall == 1


def test_few_and_no_vectors() -> None:
    for n in (0, 1, 5):
        catalog = VectorCatalog(clustered(n).reshape(n, DIMENSION))
        index = over(catalog)
        assert index.base.description.recall == 1  # type: ignore[attr-defined]
        assert index.search(clustered(2, seed=1), 3)[1].shape == (2, min(3, n))


def test_vectors_that_are_not_finite_are_refused() -> None:
    vectors = clustered(600)
    vectors[300, 3] = np.nan
    with pytest.raises(ValueError, match="a vector is not finite"):
        build(VectorCatalog(vectors), DIMENSION, "hnsw", 0.9)
    catalog = VectorCatalog(clustered(600))
    index = over(catalog)
    catalog.add(vectors[300:301])
    with pytest.raises(ValueError, match="a vector is not finite"):
        index.extended()


def test_what_faiss_cannot_build_says_why() -> None:
    with pytest.raises(ConfigError, match=r"'IVF512,Flat', which FAISS cannot build of 20 vectors"):
        build(VectorCatalog(clustered(20)), DIMENSION, "IVF512,Flat", 0.9)


def test_a_build_can_be_stopped() -> None:
    stop = Event()
    stop.set()
    with pytest.raises(BuildStopped):
        build(VectorCatalog(clustered(600)), DIMENSION, "hnsw", 0.9, stop)


# Kinds


def test_auto_chooses_by_number() -> None:
    numbers = 0, 200_000, 200_001, 2_000_000, 2_000_001, 10**9
    kinds = ["flat", "flat", "hnsw", "hnsw", "ivfpq", "ivfpq"]
    assert [chosen_kind("auto", n) for n in numbers] == kinds
    assert [chosen_kind("auto", n, "hnsw") for n in (100_000, 100_001)] == ["flat", "hnsw"]
    assert [chosen_kind("auto", n, "ivfpq") for n in (10**6, 10**6 + 1)] == ["hnsw", "ivfpq"]
    assert chosen_kind("auto", 150_000, "flat") == "flat"
    for setting in ("flat", "numpy"):
        assert chosen_kind(setting, 10**9, "hnsw") == setting
    for setting in ("hnsw", "IVF16,Flat"):
        assert [chosen_kind(setting, n) for n in (9_999, 10_000)] == ["flat", setting]
        assert chosen_kind(setting, 5_000, setting) == setting


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("nonsense", "could not parse index string nonsense"),
        ("", "could not parse index string"),
        ("PQ7", "should be a multiple of the number of subquantizers"),
        ("LSH", "metric == METRIC_L2"),
        ("IVF100000000000,Flat", "stoi"),
        ("IDMap,HNSW8", "keeps ids of its own"),
        ("HNSW8_PQ3", "is not searched by inner product"),
    ],
)
def test_settings_that_are_no_kind_say_why(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match="choose one of auto, flat, numpy, hnsw, ivfpq") as error:
        check_setting(setting, DIMENSION)
    assert said in str(error.value) and repr(setting) in str(error.value)


def test_named_kinds_fit_every_dimension() -> None:
    for name in ("auto", "flat", "numpy", "hnsw", "ivfpq", "IVF16,Flat"):
        check_setting(name, DIMENSION)
    for dimension in (1, 7, 24, 100, 384, 768, 1024):
        for vectors in (10_000, 10_000_000):
            index = made("ivfpq", dimension, vectors)
            assert index.d == dimension and index.nlist * 16 <= vectors
            assert made("hnsw", dimension, vectors).d == dimension


# Files


def test_a_saved_index_is_loaded_by_value(
    base: BaseIndex, catalog: VectorCatalog, tmp_path: Path
) -> None:
    path = tmp_path / "vectors"
    base.save(path, catalog.generation)
    again, reason = BaseIndex.load(path, catalog, DIMENSION)
    assert again is not None and reason == ""
    assert again.description == base.description == describe_index(path)
    mine, other = (ApproximateIndex.over(b, catalog, DIMENSION) for b in (base, again))
    queries = clustered(20, seed=1)
    for a, b in zip(mine.search(queries, 10), other.search(queries, 10), strict=True):
        np.testing.assert_array_equal(a, b)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_index_of_an_earlier_generation_is_of_use(tmp_path: Path) -> None:
    path, catalog = tmp_path / "vectors", VectorCatalog(clustered(600))
    over(catalog).base.save(path, catalog.generation)  # type: ignore[attr-defined]
    new = catalog.add(clustered(20, seed=3))
    catalog.delete(range(0, 600, 2))
    again, _ = BaseIndex.load(path, catalog, DIMENSION)
    assert again is not None
    index = ApproximateIndex.over(again, catalog, DIMENSION)
    assert index.search(clustered(20, seed=3), 1)[1][:, 0].tolist() == [*new]


def reload(path: Path, catalog: VectorCatalog, dimension: int = DIMENSION) -> str:
    found, reason = BaseIndex.load(path, catalog, dimension)
    assert found is None
    return reason


def test_files_of_no_use_say_why(tmp_path: Path) -> None:
    path, vectors = tmp_path / "vectors", clustered(600)
    catalog = VectorCatalog(vectors)
    assert reload(path, catalog).startswith("it cannot be read") and describe_index(path) is None
    over(catalog).base.save(path, catalog.generation)  # type: ignore[attr-defined]
    whole = path.read_bytes()
    assert reload(path, catalog, 32).startswith("it is of kind 3, dimension 24, not 3, 32")
    assert FaissIndex.load(path, dimension=24, generation=1)[1].startswith("it is of kind 3")
    foreign = VectorCatalog(clustered(600, seed=1))
    assert reload(path, foreign) == "it is of another catalog"
    restored = VectorCatalog(vectors[:400])  # from a copy of an earlier state
    assert reload(path, restored) == "it is of a later generation than the catalog"
    restored.add(clustered(300, seed=1))
    assert reload(path, restored) == "it is of another catalog"
    emptied = VectorCatalog(vectors)
    emptied.delete(range(600))
    assert reload(path, emptied) == "it is of another catalog"
    catalog.generation = 0
    assert reload(path, catalog) == "it is of a later generation than the catalog"
    catalog.generation = 1
    generator = np.random.default_rng(0)
    for at in [*range(80), *generator.integers(0, len(whole), 60).tolist()]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert reload(path, catalog).startswith("it")
    for size in (0, 9, 48, 70, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert reload(path, catalog).startswith("it")
        assert describe_index(path) is None
    filled(FaissIndex).save(path, 1)
    assert reload(path, catalog) == "it is of kind 2, dimension 24, not 3, 24"
    assert describe_index(path) == IndexDescription("flat", 50, 1.0)


def test_notes_of_another_release_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, catalog = tmp_path / "vectors", VectorCatalog(clustered(600))
    base = build(catalog, DIMENSION, "hnsw", 0.9)
    monkeypatch.setattr(index_description, "asdict", lambda description: {"sort": "hnsw"})
    base.save(path, 1)
    assert describe_index(path) is None
    assert reload(path, catalog) == "its payload is not what it says"


def test_a_payload_that_lies_under_a_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, catalog = tmp_path / "vectors", VectorCatalog(clustered(600))
    base = build(catalog, DIMENSION, "hnsw", 0.9)
    base.save(path, 1)
    whole = path.read_bytes()[48:]
    for payload in (b"", b"junk" * 20, whole[:-9], whole + b"\0", whole[:20]):
        monkeypatch.setattr(BaseIndex, "_write", lambda self, file, p=payload: file.write(p))
        base.save(path, 1)
        assert reload(path, catalog) == "its payload is not what it says"


@pytest.mark.parametrize("piece", [1, 3])
def test_a_disk_that_is_full_is_said(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragcache.retriever import faiss_stream

    class Full:
        def __init__(self) -> None:
            self.left = piece

        def write(self, data: bytes) -> int:
            self.left -= 1
            if not self.left:
                raise OSError(28, "No space left on device")
            return len(data)

    with pytest.raises(OSError, match="No space left on device"):
        faiss_stream.write_faiss(faiss.IndexFlatIP(3), Full())  # type: ignore[arg-type]


# GPUs


class CopyOfCpu:
    """What FAISS for GPUs does, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "") -> None:
        self.copies, self.error = 0, error
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
        monkeypatch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
        monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", self.copy, raising=False)

    def copy(self, memory: object, device: int, index: Any, options: SimpleNamespace) -> Any:
        if self.error:
            raise RuntimeError(self.error)
        assert device == 0 and options.useFloat16 == isinstance(index, faiss.IndexIVFPQ)
        self.copies += 1
        return faiss.clone_index(index)


def test_gpus_search_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_copy.gpus() == 0 and gpu_copy.gpu_copy(faiss.IndexFlatIP(3)) is None
    catalog = VectorCatalog(clustered(1500))
    queries = clustered(20, seed=1)
    expected = {
        kind: over(catalog, kind).search(queries, 10)
        for kind in ("IVF8,PQ3x4np", "IVF16,Flat", "hnsw")
    }
    on_gpu = CopyOfCpu(monkeypatch)
    for kind, found in expected.items():
        before = on_gpu.copies
        for a, b in zip(over(catalog, kind).search(queries, 10), found, strict=True):
            np.testing.assert_array_equal(a, b)
        assert on_gpu.copies - before == (0 if kind == "hnsw" else 1)


def test_a_flat_index_on_a_gpu_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = CopyOfCpu(monkeypatch)
    mine, exact = filled(FaissIndex, 4000), filled(NumpyIndex, 4000)
    for k in (10, 3000):  # more than a GPU returns
        assert_same(mine, exact, k)
    for index in (mine, exact):
        index.remove(np.arange(0, 900, 3))
    assert_same(mine, exact)
    assert on_gpu.copies == 2  # a copy is made again after a change


def test_a_gpu_without_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    CopyOfCpu(monkeypatch, "out of memory")
    assert_same(filled(FaissIndex), filled(NumpyIndex))
    assert "cannot be copied to a GPU (out of memory): the CPU searches it" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_copy.gpus(), reason="needs FAISS for GPUs, and a GPU")
@pytest.mark.parametrize("kind", ["flat", "ivfpq", "IVF64,Flat", "IVF64,SQ8"])
def test_a_gpu_finds_what_the_cpu_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, queries = VectorCatalog(clustered(20_000)), clustered(100, seed=1)

    def found() -> tuple[Vectors, Ids]:
        if kind != "flat":
            return over(catalog, kind).search(queries, 10)
        index = FaissIndex(DIMENSION)
        index.add(*catalog.vectors())
        return index.search(queries, 10)

    on_gpu = found()
    monkeypatch.setattr(gpu_copy, "gpus", lambda: 0)
    on_cpu = found()
    if kind == "flat":
        np.testing.assert_array_equal(on_gpu[1], on_cpu[1])
        np.testing.assert_array_equal(on_gpu[0], on_cpu[0])
    same = [
        len(set(a) & set(b)) / 10
        for a, b in zip(on_gpu[1].tolist(), on_cpu[1].tolist(), strict=True)
    ]
    assert np.mean(same) > 0.97  # which candidates come last depends on rounding
