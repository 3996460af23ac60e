"""The checked-in store of format 1 is read by value, whatever has been written since."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from ragcache.store import Catalog, DiskStore, Miss
from ragcache.types import ChunkKV
from tests.store import fixture
from tests.store.samples import make_key, make_kv, same


@pytest.fixture(params=[False, True], ids=["written to", "readonly"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DiskStore:
    shutil.copytree(fixture.V1, tmp_path / "v1")
    return DiskStore(tmp_path / "v1", readonly=request.param)


def test_chunks_of_both_layouts(store: DiskStore) -> None:
    with store:
        assert store.verify() == {} and store.stats().chunks == 6
        for key in (fixture.RECORDS, fixture.FILE):
            assert same(store.get(key), make_kv(key))
        assert list((store.tables.path / "kv").rglob("*-*"))


@pytest.mark.parametrize(("codec", "error"), [("int8", 0.02), ("fp8", 0.1), ("cachegen", 0.2)])
def test_every_codec(store: DiskStore, codec: str, error: float) -> None:
    key = fixture.CODED[codec]
    with store:
        found, want = store.get(key), make_kv(key)
        assert isinstance(found, ChunkKV) and found.sensitivity == want.sensitivity
        pairs = zip(found.keys + found.values, want.keys + want.values, strict=True)
        assert all(float((a - b).norm()) < error * float(b.norm()) for a, b in pairs)
        planes = torch.stack(found.keys + found.values).numpy()
        assert blake3(planes.astype("<f4").tobytes()).hexdigest()[:16] == fixture.DECODED[codec]


def test_a_variant_with_its_notes(store: DiskStore) -> None:
    with store:
        [variant] = store.variants.find(fixture.RECORDS)
        assert (variant.notes, variant.score) == (fixture.NOTES, 2.5)
        assert same(store.get(variant.stored.key), make_kv(fixture.VARIANT, seed=1))


def test_the_catalog(store: DiskStore) -> None:
    with store:
        catalog = Catalog(store)
        [entry] = catalog.entries()
        assert (entry.id, entry.chunks, entry.expires, entry.pinned) == (
            fixture.DOCUMENT.id,
            2,
            fixture.EXPIRES,
            True,
        )
        rows, vectors = catalog.vectors()
        assert catalog.chunks(rows) == fixture.CHUNKS and np.array_equal(vectors, fixture.VECTORS)
        assert catalog.get_setting("model") == "tiny"
        assert catalog.document_digest(fixture.DOCUMENT.id) == b"digest"


def test_it_lives_on(store: DiskStore) -> None:
    with store:
        if store.tables.readonly:
            return
        new = make_key(50)
        store.put(new, make_kv(new))
        assert Catalog(store).delete_document(fixture.DOCUMENT.id)
        assert isinstance(store.get(fixture.RECORDS), Miss)
        assert same(store.get(new), make_kv(new)) and store.verify() == {}
