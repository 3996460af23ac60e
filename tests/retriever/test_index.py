"""FAISS against the plain index, by value; files that are not what they should be are refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from ragcache.errors import ConfigError
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex, VectorIndex
from tests.retriever.conftest import unit

DIMENSION = 24


def filled(kind: type[VectorIndex], n: int = 50, seed: int = 0) -> VectorIndex:
    index = kind(DIMENSION)
    index.add(np.arange(n)[::-1] * 3, unit(np.random.default_rng(seed), n, DIMENSION))
    return index


def assert_same(a: VectorIndex, b: VectorIndex, k: int = 10) -> None:
    queries = unit(np.random.default_rng(99), 30, DIMENSION)
    (scores, ids), (other_scores, other_ids) = a.search(queries, k), b.search(queries, k)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_array_equal(scores, other_scores)
    np.testing.assert_array_equal(a.ids, b.ids)


def test_scores_are_cosines_best_first(kind: type[VectorIndex]) -> None:
    index = kind(2)
    index.add([7, 1, 4], [[1, 0], [0, 1], [-1, 0]])
    scores, ids = index.search([[0.6, 0.8]], 3)
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_array_equal(ids, [[1, 7, 4]])
    np.testing.assert_array_equal(scores, np.array([[0.8, 0.6, -0.6]], np.float32))


@pytest.mark.parametrize("k", [1, 7, 500, 2000])
def test_faiss_equals_numpy(k: int) -> None:
    assert_same(filled(FaissIndex, 500), filled(NumpyIndex, 500), k)


def test_reference_equals_a_matrix_product(kind: type[VectorIndex]) -> None:
    vectors = unit(np.random.default_rng(1), 200, DIMENSION)
    queries = unit(np.random.default_rng(2), 20, DIMENSION)
    index = kind(DIMENSION)
    index.add(np.arange(200), vectors)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    scores, ids = index.search(queries, 5)
    np.testing.assert_array_equal(ids, np.argsort(-exact, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], rtol=1e-6)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyIndex, "_BLOCK", 7)
    assert_same(filled(FaissIndex), filled(NumpyIndex))


def test_ties_go_to_the_smaller_id(kind: type[VectorIndex]) -> None:
    generator = np.random.default_rng(3)
    few = unit(generator, 4, DIMENSION)
    which, ids = generator.integers(0, 4, 400), generator.permutation(400)
    index = kind(DIMENSION)
    index.add(ids, few[which])
    queries = unit(generator, 10, DIMENSION)
    for query, found in zip(queries, index.search(queries, 150)[1], strict=True):
        order = np.argsort(-(few @ query))  # of the four vectors; then by id among their copies
        expected = np.concatenate([np.sort(ids[which == v]) for v in order])[:150]
        np.testing.assert_array_equal(found, expected)


def test_near_ties_are_ordered_by_exact_score() -> None:
    generator = np.random.default_rng(4)
    base = unit(generator, 1, DIMENSION)
    rows = base + 1e-7 * generator.standard_normal((300, DIMENSION))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    a, b = NumpyIndex(DIMENSION), FaissIndex(DIMENSION)
    for index in (a, b):
        index.add(np.arange(300), rows)
    for k in (1, 20, 299):
        np.testing.assert_array_equal(a.search(base, k)[1], b.search(base, k)[1])
    assert_same(a, b)


def test_fewer_vectors_than_k_give_all(kind: type[VectorIndex]) -> None:
    scores, ids = filled(kind, 3).search(unit(np.random.default_rng(0), 2, DIMENSION), 10)
    assert scores.shape == ids.shape == (2, 3)
    scores, ids = kind(DIMENSION).search(unit(np.random.default_rng(0), 2, DIMENSION), 10)
    assert scores.shape == ids.shape == (2, 0)


def test_removal() -> None:
    a, b = filled(FaissIndex), filled(NumpyIndex)
    for index in (a, b):
        assert index.remove([0, 3, 6, 7, 147, 10_000]) == 4
        assert index.remove([0]) == 0
        assert index.remove([]) == 0
        assert len(index) == 46 and 3 not in index.ids
    assert_same(a, b, 46)


def test_replacement(kind: type[VectorIndex]) -> None:
    index = filled(kind)
    new = unit(np.random.default_rng(8), 3, DIMENSION)
    index.add([9, 1000, 0], new)
    assert len(index) == 51
    scores, ids = index.search(new, 1)
    np.testing.assert_array_equal(ids[:, 0], [9, 1000, 0])
    np.testing.assert_allclose(scores, 1, atol=1e-6)


def test_random_changes_keep_both_alike() -> None:
    generator = np.random.default_rng(5)
    a, b = FaissIndex(DIMENSION), NumpyIndex(DIMENSION)
    for _ in range(40):
        ids = generator.choice(120, generator.integers(0, 30), replace=False)
        if generator.random() < 0.4:
            assert a.remove(ids) == b.remove(ids)
        else:
            rows = unit(generator, len(ids), DIMENSION)
            a.add(ids, rows)
            b.add(ids, rows)
        assert len(a) == len(b) == len(a.ids)
    assert_same(a, b)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1], np.full((1, DIMENSION), np.nan), "not finite"),
        ([1], np.full((1, DIMENSION), np.inf), "not finite"),
        ([1], np.ones((1, DIMENSION)), "longer than 1"),
        ([1], np.zeros((1, DIMENSION + 1)), r"shape \(1, 25\), expected \(n, 24\)"),
        ([1], np.zeros(DIMENSION), "shape"),
        ([1, 2], np.zeros((1, DIMENSION)), "1 vectors but ids of shape"),
        ([1, 1], np.zeros((2, DIMENSION)), "distinct"),
        ([-1], np.zeros((1, DIMENSION)), "not below 0"),
    ],
)
def test_bad_vectors_change_nothing(
    kind: type[VectorIndex], ids: list[int], rows: np.ndarray, message: str
) -> None:
    index = filled(kind)
    with pytest.raises(ValueError, match=message):
        index.add(ids, rows)
    assert_same(index, filled(kind))


def test_bad_searches(kind: type[VectorIndex]) -> None:
    index = filled(kind)
    with pytest.raises(ConfigError, match="k is 0"):
        index.search(np.zeros((1, DIMENSION)), 0)
    with pytest.raises(ValueError, match="shape"):
        index.search(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((1, DIMENSION), np.nan), 1)
    with pytest.raises(ConfigError, match="dimension is 0"):
        kind(0)


@pytest.mark.parametrize("n", [0, 1, 50])
def test_reload(kind: type[VectorIndex], n: int, tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    index = filled(kind, n)
    index.save(path, 2**40)
    again, reason = kind.load(path, dimension=DIMENSION, generation=2**40)
    assert again is not None and reason == ""
    assert_same(again, index)
    again.add([1], unit(np.random.default_rng(0), 1, DIMENSION))  # and is no frozen view
    assert again.remove([1]) == 1
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["vectors"]


def test_files_of_no_use_are_told_apart(kind: type[VectorIndex], tmp_path: Path) -> None:
    path = tmp_path / "vectors"

    def reason(dimension: int = DIMENSION, generation: int = 5) -> str:
        index, why = kind.load(path, dimension=dimension, generation=generation)
        assert index is None
        return why

    assert reason() == "it cannot be read: No such file or directory"
    filled(kind).save(path, 5)
    whole = path.read_bytes()
    assert reason(generation=6) == "it is of generation 5, not 6"
    assert "dimension 24" in reason(dimension=32)
    other = FaissIndex if kind is NumpyIndex else NumpyIndex
    assert other.load(path, dimension=DIMENSION, generation=5)[1].startswith("it is of kind")
    path.write_bytes(b"")
    assert reason() == "it is not an index"
    path.write_bytes(b"\x80" + whole[1:])
    assert reason() == "it is not an index"
    path.write_bytes(whole[:8] + struct.pack("<H", 2) + whole[10:])
    assert reason() == "it has layout 2, not 1"
    for size in (9, 47, 48, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert reason().startswith(("it has", "it is not an index"))
    path.write_bytes(whole + b"\0")
    assert reason().startswith("it has")


def test_every_flipped_byte_is_noticed(kind: type[VectorIndex], tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    filled(kind, 2).save(path, 5)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert kind.load(path, dimension=DIMENSION, generation=5)[0] is None, at


def test_payload_that_lies_under_a_right_checksum(
    kind: type[VectorIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors"
    for payload in (b"", b"junk" * 20, filled(kind, 3)._pack()):
        index = filled(kind)
        monkeypatch.setattr(index, "_pack", lambda payload=payload: payload)
        index.save(path, 5)
        found, reason = kind.load(path, dimension=DIMENSION, generation=5)
        assert found is None and reason == "its payload is not what it says"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(
    kind: type[VectorIndex], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors"
    filled(kind).save(path, 1)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        filled(kind, 7).save(path, 2)
    assert os.listdir(tmp_path) == ["vectors"]
    kept, _ = kind.load(path, dimension=DIMENSION, generation=1)
    assert kept is not None and len(kept) == 50


def test_save_makes_file_and_folder_durable_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_replace(source: str, target: Path) -> None:
        steps.append("replace")
        replace(source, target)

    def note_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "fsync", note_fsync)
    filled(NumpyIndex).save(tmp_path / "vectors", 1)
    assert steps == ["file", "replace", "folder"]
