"""References from documents to KV: KV that is no longer used is deleted in the same commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from ragcache.store import Catalog, ChunkKey, ChunkStore
from ragcache.store.catalog.catalog import TableStore
from ragcache.store.key import variant_key
from ragcache.store.tiers.base import Tier
from ragcache.types import Chunk, ChunkNotes, Document
from tests.store.samples import MODEL, OTHER, make_key, make_kv

A, B, C = (make_key(first) for first in (1, 2, 3))


@pytest.fixture
def catalog(store: ChunkStore) -> Catalog:
    """Over a store that has KV of three chunks; of a tier, in the store below it."""
    for key in (A, B, C):
        store.put(key, make_kv(key))
    while isinstance(store, Tier):
        store = store.below
    return Catalog(cast("TableStore", store))


def put(
    catalog: Catalog,
    name: str,
    keys: Sequence[ChunkKey],
    *,
    expires: float | None = None,
    pinned: bool = False,
) -> None:
    chunks = [Chunk(name, n, f"{name} {n}") for n in range(len(keys))]
    vectors = np.ones((len(keys), 4), np.float32)
    contents = [key.content for key in keys]
    document = Document(name, "text")
    catalog.put_document(
        document, chunks, vectors, b"", contents=contents, expires=expires, pinned=pinned
    )


def stored(store: ChunkStore) -> set[ChunkKey]:
    return {key for key in (A, B, C) if store.has(key)}


def test_an_update_lets_go_of_what_only_the_old_text_used(
    catalog: Catalog, store: ChunkStore
) -> None:
    put(catalog, "one", [A, B])
    put(catalog, "two", [B])
    put(catalog, "one", [C])
    assert stored(store) == {B, C}  # two has B, nobody has A
    put(catalog, "one", [C, C])
    put(catalog, "one", [C])
    assert stored(store) == {B, C}


def test_deleting_takes_all_kv_of_the_tokens(catalog: Catalog, store: ChunkStore) -> None:
    """Of every model, encoding context and variant; of another tenant's equal tokens, none."""
    another, variant = ChunkKey(OTHER, A.tokens, (1,), "bos"), variant_key(MODEL, A.tokens, (7,))
    foreign = ChunkKey(MODEL, A.tokens, tenant="else")
    store.put(another, make_kv(another))
    store.variants.put(variant, make_kv(variant), ChunkNotes((), (), (0.5,) * 5, 0.6))
    store.put(foreign, make_kv(foreign))
    put(catalog, "one", [A])
    assert catalog.delete_document("one") and not catalog.delete_document("one")
    assert not any(map(store.has, (A, another, variant))) and store.has(foreign)
    assert stored(store) == {B, C} and store.verify() == {}


def test_kv_that_no_document_ever_used_stays(catalog: Catalog, store: ChunkStore) -> None:
    put(catalog, "one", [A])
    catalog.delete_document("one")
    assert stored(store) == {B, C}


def test_another_models_chunks_are_let_go_of_too(catalog: Catalog, store: ChunkStore) -> None:
    put(catalog, "one", [A])
    catalog.add_references("one", [B.content])
    catalog.add_references("one", [B.content])
    catalog.add_references("one", [C.content, C.content])  # another text by now: passed over
    catalog.add_references("nobody", [C.content])
    catalog.delete_document("one")
    assert stored(store) == {C}


def test_expired_documents_are_gone_with_their_kv(catalog: Catalog, store: ChunkStore) -> None:
    put(catalog, "soon", [A], expires=100.0)
    put(catalog, "late", [B], expires=200.0)
    put(catalog, "kept", [C])
    assert catalog.expire(99.0) == []
    assert catalog.expire(150.0) == ["soon"] and stored(store) == {B, C}
    assert catalog.set_retention("late", expires=300.0) and not catalog.set_retention(
        "soon", expires=300.0
    )
    assert catalog.expire(250.0) == []
    put(catalog, "late", [B], expires=260.0)
    assert catalog.expire(260.0) == ["late"] and stored(store) == {C}
    assert catalog.expire(1e12) == [] and [e.id for e in catalog.entries()] == ["kept"]


def test_entries_say_what_was_put(catalog: Catalog) -> None:
    put(catalog, "b", [A, B], expires=5.0)
    put(catalog, "a", [], pinned=True)
    first, second = catalog.entries()
    assert (first.id, first.chunks, first.expires, first.pinned) == ("a", 0, None, True)
    assert (second.id, second.chunks, second.expires, second.pinned) == ("b", 2, 5.0, False)
    catalog.set_retention("b", pinned=True)
    assert [e.pinned for e in catalog.entries()] == [True, True]
