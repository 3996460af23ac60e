"""Tests of the contract of a vector index, against NumpyIndex and a matrix product, by value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from ragcache.errors import ConfigError
from ragcache.retriever.index import NumpyIndex, VectorIndex, Vectors

__all__ = ["VectorIndexTests"]

DIMENSION = 24


def unit(generator: np.random.Generator, n: int, dimension: int = DIMENSION) -> Vectors:
    """Random vectors of length 1, (n, dimension)."""
    rows = generator.standard_normal((n, dimension)).astype(np.float32)
    made: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return made


def filled(kind: type[VectorIndex], n: int = 50, seed: int = 0) -> VectorIndex:
    """An index of ``n`` random vectors, under every third id."""
    index = kind(DIMENSION)
    index.add(np.arange(n)[::-1] * 3, unit(np.random.default_rng(seed), n))
    return index


def assert_same(a: VectorIndex, b: VectorIndex, k: int = 10) -> None:
    """Raise AssertionError unless both find the same ids with the same scores, bit for bit."""
    queries = unit(np.random.default_rng(99), 30)
    (scores, ids), (other_scores, other_ids) = a.search(queries, k), b.search(queries, k)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_array_equal(scores, other_scores)
    np.testing.assert_array_equal(a.ids, b.ids)


class VectorIndexTests:
    """Tests of a :class:`~ragcache.retriever.index.VectorIndex`.

    A subclass sets ``kind``, the class to test.
    """

    kind: ClassVar[type[VectorIndex]]

    def test_scores_are_cosines_best_first(self) -> None:
        index = self.kind(2)
        index.add([7, 1, 4], [[1, 0], [0, 1], [-1, 0]])
        scores, ids = index.search([[0.6, 0.8]], 3)
        assert scores.dtype == np.float32 and ids.dtype == np.int64
        np.testing.assert_array_equal(ids, [[1, 7, 4]])
        np.testing.assert_array_equal(scores, np.array([[0.8, 0.6, -0.6]], np.float32))

    @pytest.mark.parametrize("k", [1, 7, 500, 2000])
    def test_it_equals_the_plain_index(self, k: int) -> None:
        assert_same(filled(self.kind, 500), filled(NumpyIndex, 500), k)

    def test_the_nearest_are_those_of_a_matrix_product(self) -> None:
        vectors = unit(np.random.default_rng(1), 200)
        queries = unit(np.random.default_rng(2), 20)
        index = self.kind(DIMENSION)
        index.add(np.arange(200), vectors)
        exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
        scores, ids = index.search(queries, 5)
        np.testing.assert_array_equal(ids, np.argsort(-exact, axis=1)[:, :5])
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], rtol=1e-6)

    def test_ties_go_to_the_smaller_id(self) -> None:
        generator = np.random.default_rng(3)
        few = unit(generator, 4)
        which, ids = generator.integers(0, 4, 400), generator.permutation(400)
        index = self.kind(DIMENSION)
        index.add(ids, few[which])
        queries = unit(generator, 10)
        for query, found in zip(queries, index.search(queries, 150)[1], strict=True):
            order = np.argsort(-(few @ query))  # of the four vectors; then by id among their copies
            expected = np.concatenate([np.sort(ids[which == v]) for v in order])[:150]
            np.testing.assert_array_equal(found, expected)

    def test_near_ties_are_ordered_by_exact_score(self) -> None:
        generator = np.random.default_rng(4)
        base = unit(generator, 1)
        rows = base + 1e-7 * generator.standard_normal((300, DIMENSION))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        mine, plain = self.kind(DIMENSION), NumpyIndex(DIMENSION)
        for index in (mine, plain):
            index.add(np.arange(300), rows)
        for k in (1, 20, 299):
            np.testing.assert_array_equal(mine.search(base, k)[1], plain.search(base, k)[1])
        assert_same(mine, plain)

    def test_fewer_vectors_than_k_give_all(self) -> None:
        queries = unit(np.random.default_rng(0), 2)
        scores, ids = filled(self.kind, 3).search(queries, 10)
        assert scores.shape == ids.shape == (2, 3)
        assert [sorted(row) for row in ids.tolist()] == [[0, 3, 6]] * 2
        scores, ids = self.kind(DIMENSION).search(queries, 10)
        assert scores.shape == ids.shape == (2, 0)

    @pytest.mark.parametrize("k", [1, 7, 40, 500])
    def test_a_search_among_ids_is_that_of_an_index_of_them(self, k: int) -> None:
        index, part = filled(self.kind, 500), self.kind(DIMENSION)
        generator = np.random.default_rng(6)
        among = generator.permutation(index.ids)[:40]
        vectors = unit(np.random.default_rng(0), 500)  # of the ids 1497, 1494, ..., 0
        part.add(among, vectors[(499 - among // 3)])
        queries = unit(generator, 10)
        unknown = [1, 10_000]
        scores, ids = index.search(queries, k, np.concatenate([among, among[:3], unknown]))
        expected_scores, expected = part.search(queries, k)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(scores, expected_scores)
        assert index.search(queries, k, unknown)[1].shape == (10, 0)
        assert index.search(queries, k, [])[1].shape == (10, 0)

    def test_what_was_removed_is_not_found(self) -> None:
        mine, plain = filled(self.kind), filled(NumpyIndex)
        for index in (mine, plain):
            assert index.remove([0, 3, 6, 7, 147, 10_000]) == 4
            assert index.remove([0]) == 0
            assert index.remove([]) == 0
            assert len(index) == 46 and 3 not in index.ids
        assert_same(mine, plain, 46)

    def test_an_id_that_is_there_is_replaced(self) -> None:
        index = filled(self.kind)
        new = unit(np.random.default_rng(8), 3)
        index.add([9, 1000, 0], new)
        assert len(index) == 51
        scores, ids = index.search(new, 1)
        np.testing.assert_array_equal(ids[:, 0], [9, 1000, 0])
        np.testing.assert_allclose(scores, 1, atol=1e-6)

    def test_random_changes_keep_it_equal_to_the_plain_index(self) -> None:
        generator = np.random.default_rng(5)
        mine, plain = self.kind(DIMENSION), NumpyIndex(DIMENSION)
        for _ in range(40):
            ids = generator.choice(120, generator.integers(0, 30), replace=False)
            if generator.random() < 0.4:
                assert mine.remove(ids) == plain.remove(ids)
            else:
                rows = unit(generator, len(ids))
                mine.add(ids, rows)
                plain.add(ids, rows)
            assert len(mine) == len(plain) == len(mine.ids)
        assert_same(mine, plain)

    @pytest.mark.parametrize(
        ("ids", "rows", "message"),
        [
            ([1], np.full((1, DIMENSION), np.nan), "not finite"),
            ([1], np.full((1, DIMENSION), np.inf), "not finite"),
            ([1], np.ones((1, DIMENSION)), "longer than 1"),
            ([1], np.zeros((1, DIMENSION + 1)), r"shape \(1, 25\), expected \(n, 24\)"),
            ([1], np.zeros(DIMENSION), r"vectors of shape \(24,\)"),
            ([1, 2], np.zeros((1, DIMENSION)), "1 vectors but ids of shape"),
            ([1, 1], np.zeros((2, DIMENSION)), "ids must be distinct"),
            ([-1], np.zeros((1, DIMENSION)), "not below 0"),
        ],
    )
    def test_bad_vectors_change_nothing(
        self, ids: list[int], rows: np.ndarray, message: str
    ) -> None:
        index = filled(self.kind)
        with pytest.raises(ValueError, match=message):
            index.add(ids, rows)
        assert_same(index, filled(self.kind))

    def test_bad_searches_are_refused(self) -> None:
        index = filled(self.kind)
        with pytest.raises(ConfigError, match="^k is 0: ask for at least 1"):
            index.search(np.zeros((1, DIMENSION)), 0)
        with pytest.raises(ValueError, match=r"vectors of shape \(1, 3\)"):
            index.search(np.zeros((1, 3)), 1)
        with pytest.raises(ValueError, match="a vector is not finite"):
            index.search(np.full((1, DIMENSION), np.nan), 1)
        with pytest.raises(ConfigError, match="dimension is 0: it must be at least 1"):
            self.kind(0)

    @pytest.mark.parametrize("n", [0, 1, 50])
    def test_a_saved_index_is_loaded_by_value(self, n: int, tmp_path: Path) -> None:
        path = tmp_path / "vectors"
        index = filled(self.kind, n)
        index.save(path, 2**40)
        again, reason = self.kind.load(path, dimension=DIMENSION, generation=2**40)
        assert again is not None and reason == ""
        assert_same(again, index)
        again.add([1], unit(np.random.default_rng(0), 1))  # it can be changed again
        assert again.remove([1]) == 1
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == ["vectors"]

    def test_files_of_no_use_say_why(self, tmp_path: Path) -> None:
        path = tmp_path / "vectors"

        def reason(dimension: int = DIMENSION, generation: int = 5) -> str:
            index, why = self.kind.load(path, dimension=dimension, generation=generation)
            assert index is None
            return why

        assert reason() == "it cannot be read: No such file or directory"
        filled(self.kind).save(path, 5)
        whole = path.read_bytes()
        assert reason(generation=6) == "it is of generation 5, not 6"
        assert "dimension 24" in reason(dimension=32)
        path.write_bytes(b"")
        assert reason() == "it is not an index"
        path.write_bytes(b"\x80" + whole[1:])
        assert reason() == "it is not an index"
        for size in (9, 47, 48, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert reason().startswith(("it has", "it is not an index"))
        path.write_bytes(whole + b"\0")
        assert reason().startswith("it has")

    def test_every_flipped_byte_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "vectors"
        filled(self.kind, 2).save(path, 5)
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            assert self.kind.load(path, dimension=DIMENSION, generation=5)[0] is None, at
