"""The catalog over both kinds of tables: what was put, and nothing that was replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ragcache.errors import ConfigError, StoreError
from ragcache.store import Catalog, DiskStore, MemoryStore
from ragcache.store.catalog.chunks import _vector
from ragcache.store.format.checksummed import put_checksummed
from ragcache.types import Chunk, Document
from tests import scene
from tests.store.samples import ONE, make_key, make_kv


@pytest.fixture(params=["memory", "lmdb"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    with MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "s") as store:
        yield Catalog(store)


def vectors(count: int, seed: int = 0, dim: int = 4) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


def add(catalog: Catalog, name: str, count: int, seed: int = 0) -> tuple[list[Chunk], list[int]]:
    document = Document(name, "text", {"source": "here"})
    chunks = [Chunk(name, i, f"{name} {i} é {seed}", {"page": str(i)}) for i in range(count)]
    catalog.put_document(document, chunks, vectors(count, seed), bytes([seed]))
    rows = catalog.rows_of(document.id)
    return chunks, rows


def ids(catalog: Catalog) -> list[str]:
    return [entry.id for entry in catalog.entries()]


def test_an_empty_catalog(catalog: Catalog) -> None:
    rows, matrix = catalog.vectors()
    assert rows.shape == (0,) and rows.dtype == np.int64 and matrix.shape == (0, 0)
    assert (catalog.generation, catalog.dimension, ids(catalog)) == (0, None, [])
    assert catalog.rows_of("a") == [] and catalog.document_digest("a") is None
    assert not catalog.delete_document("a") and catalog.generation == 0


def test_what_was_put_comes_back(catalog: Catalog) -> None:
    (chunks_a, rows_a), (chunks_b, rows_b) = add(catalog, "a", 3, 1), add(catalog, "b", 2, 2)
    assert ids(catalog) == ["a", "b"]
    assert catalog.chunks(rows_b + rows_a) == chunks_b + chunks_a
    assert catalog.chunk(rows_a[1]) == chunks_a[1]
    assert (catalog.rows_of("a"), catalog.rows_of("b")) == (rows_a, rows_b)
    assert catalog.document_digest("b") == b"\2"
    rows, matrix = catalog.vectors()
    assert rows.tolist() == rows_a + rows_b and rows.dtype == np.int64
    assert np.array_equal(matrix, np.concatenate([vectors(3, 1), vectors(2, 2)]))
    assert catalog.dimension == 4


def test_vectors_of_rows_in_the_order_asked(catalog: Catalog) -> None:
    rows = [*add(catalog, "a", 3)[1], *add(catalog, "b", 2, seed=1)[1]]
    all_rows, all_vectors = catalog.vectors()
    assert all_rows.tolist() == rows
    np.testing.assert_array_equal(catalog.vectors_of(rows[::-1]), all_vectors[::-1])
    assert catalog.vectors_of([]).shape == (0, 4)
    with pytest.raises(KeyError):
        catalog.vectors_of([rows[-1] + 1])


def test_rows_are_read_on_from_any_row(catalog: Catalog) -> None:
    assert catalog.rows().shape == (0,) and catalog.next_row == 0
    assert catalog.vectors_after(-1, 9)[0].shape == (0,)
    rows = [*add(catalog, "a", 3)[1], *add(catalog, "b", 2, seed=1)[1]]
    _, every = catalog.vectors()
    catalog.delete_document("a")
    assert catalog.rows().tolist() == rows[3:] and catalog.rows().dtype == np.int64
    rows, every = rows[3:] + add(catalog, "a", 3)[1], np.concatenate([every[3:], every[:3]])
    for after in (-1, *rows):
        for most in (1, 2, 9):
            found, matrix = catalog.vectors_after(after, most)
            expected = [row for row in rows if row > after][:most]
            assert found.tolist() == expected
            np.testing.assert_array_equal(matrix, every[[rows.index(row) for row in expected]])
    catalog.delete_document("a")
    assert catalog.next_row == rows[-1] + 1  # though that row is gone
    assert add(catalog, "c", 1)[1] == [rows[-1] + 1]


def test_replacing_leaves_nothing_behind_and_reuses_no_row(catalog: Catalog) -> None:
    _, before = add(catalog, "a", 3, 1)
    chunks, after = add(catalog, "a", 2, 2)
    assert not set(before) & set(after)
    assert catalog.rows_of("a") == after and catalog.chunks(after) == chunks
    rows, matrix = catalog.vectors()
    assert rows.tolist() == after and np.array_equal(matrix, vectors(2, 2))
    assert catalog.document_digest("a") == b"\2"
    with pytest.raises(KeyError, match="replaced or deleted"):
        catalog.chunk(before[0])


def test_deleting_reuses_no_row(catalog: Catalog) -> None:
    _, before = add(catalog, "a", 2)
    assert catalog.delete_document("a") and not catalog.delete_document("a")
    assert ids(catalog) == [] and len(catalog.vectors()[0]) == 0
    assert add(catalog, "a", 2)[1][0] > before[-1]


def test_every_change_is_a_generation(catalog: Catalog) -> None:
    seen = [catalog.generation]
    for change in (
        lambda: add(catalog, "a", 1),
        lambda: add(catalog, "a", 1),
        lambda: catalog.delete_document("a"),
    ):
        change()
        seen.append(catalog.generation)
    assert seen == [0, 1, 2, 3]


def test_a_document_without_chunks(catalog: Catalog) -> None:
    add(catalog, "empty", 0)
    assert ids(catalog) == ["empty"] and catalog.rows_of("empty") == []
    assert catalog.document_digest("empty") == b"\0" and catalog.dimension is None


def test_another_dimension_is_refused_whole(catalog: Catalog) -> None:
    chunks, rows = add(catalog, "a", 2)
    add(catalog, "b", 1)
    with pytest.raises(ConfigError, match="dimension 5, the catalog holds dimension 4"):
        catalog.put_document(Document("a", ""), chunks, vectors(2, dim=5), b"")
    assert catalog.rows_of("a") == rows and catalog.chunks(rows) == chunks
    assert catalog.generation == 2


def test_an_emptied_catalog_takes_any_dimension(catalog: Catalog) -> None:
    chunks, _ = add(catalog, "a", 2)
    catalog.put_document(Document("a", ""), chunks, vectors(2, dim=5), b"")
    assert catalog.dimension == 5


def test_what_does_not_fit_together_is_refused(catalog: Catalog) -> None:
    chunk, document = Chunk("a", 0, "text"), Document("a", "text")
    broken = vectors(1)
    broken[0, 0] = np.nan
    for given in (vectors(2), vectors(1)[0], vectors(1, dim=0), broken):
        with pytest.raises(ValueError):
            catalog.put_document(document, [chunk], given, b"")
    with pytest.raises(ValueError, match="chunks of b put under a"):
        catalog.put_document(document, [Chunk("b", 0, "text")], vectors(1), b"")
    assert ids(catalog) == []


def test_any_id_and_text(catalog: Catalog) -> None:
    for name in ("", "x" * 5000, "ünï/\0", "bad\udcff.txt"):
        chunks, rows = add(catalog, name, 1)
        assert catalog.chunks(rows) == chunks and catalog.rows_of(name) == rows
    assert len(ids(catalog)) == 4


def test_settings(catalog: Catalog) -> None:
    assert catalog.get_setting("model") is None
    catalog.put_setting("model", "tiny")
    catalog.put_setting("model", "größer")
    assert catalog.get_setting("model") == "größer" and catalog.generation == 0
    with pytest.raises(ValueError, match="1 to 511 bytes"):
        catalog.put_setting("x" * 512, "")


def test_a_row_as_numpy_and_no_row(catalog: Catalog) -> None:
    chunks, rows = add(catalog, "a", 2)
    assert catalog.chunks(np.array(rows)) == chunks
    with pytest.raises(ValueError, match="row -1: rows count from 0"):
        catalog.chunk(-1)


@pytest.mark.parametrize("table", ["chunks", "vectors", "documents"])
@pytest.mark.parametrize("at", [0, -1])
def test_damage_is_an_error_not_another_text(disk: DiskStore, table: str, at: int) -> None:
    catalog = Catalog(disk)
    add(catalog, "a", 1)
    with disk.tables.write() as txn:
        key, record = next(iter(list(txn.items(table))))
        changed = bytearray(record)
        changed[at] ^= 1
        txn.put(table, key, bytes(changed))
    with pytest.raises(StoreError, match="is damaged: index "):
        {"chunks": lambda: catalog.chunk(0), "vectors": catalog.vectors}.get(
            table, catalog.entries
        )()


def test_it_lives_beside_the_kv_and_survives_reopening(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        chunks, rows = add(Catalog(store), "a", 2, 3)
        store.put(make_key(), make_kv(make_key()))
    with DiskStore(tmp_path / "store", readonly=True) as store:
        catalog = Catalog(store)
        assert catalog.chunks(rows) == chunks and catalog.generation == 1
        assert np.array_equal(catalog.vectors()[1], vectors(2, 3))
        assert store.has(make_key()) and store.verify() == {}
        with pytest.raises(StoreError, match="opened with readonly=True"):
            catalog.delete_document("a")


def test_vectors_that_are_damaged() -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        catalog.put_document(scene.DOCUMENTS[0], [], np.ones((0, 4), np.float32), b"")
        with pytest.raises(StoreError, match="index the documents again"):
            with store.tables.read() as txn:
                _vector(txn, b"12345678")


def test_a_vector_of_another_length() -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        chunk = Chunk("a", 0, "text")
        vectors = np.ones((1, 4), np.float32)
        catalog.put_document(Document("a", "text"), [chunk], vectors, b"", contents=[ONE.content])
        with store.tables.write() as txn:
            (row,) = list(txn.keys("vectors"))
            put_checksummed(txn, "vectors", row, np.ones(3, np.float32).tobytes())
        with pytest.raises(StoreError, match="has 3 numbers, not 4: index its document again"):
            catalog.vectors()
