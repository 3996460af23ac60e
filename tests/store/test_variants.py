"""Several KV of one chunk, with notes: every store against the one in memory."""

from __future__ import annotations

import pytest

from ragcache.store import ChunkStore, DiskStore, MemoryStore
from ragcache.store.base import Variant
from ragcache.store.key import ChunkKey, variant_key
from ragcache.types import ChunkNotes
from tests.store.samples import MODEL, ONE, OTHER, make_kv, rewrite, same, unversioned

TOKENS = ONE.tokens
FIRST, SECOND = (variant_key(MODEL, TOKENS, (1, 2, n)) for n in (3, 4))


def notes(weight: float) -> ChunkNotes:
    return ChunkNotes((b"a" * 32, b"b" * 32), (weight, 0.5), (0.1, 0.2, 0.3, 0.4, weight), 0.75)


def plain(found: list[Variant]) -> list[tuple[object, ...]]:
    """As they compare with those of another store."""
    return [(unversioned(v.stored), v.notes, v.score) for v in found]


def fill(*stores: ChunkStore) -> None:
    for store in stores:
        store.put(ONE, make_kv(ONE))
        store.variants.put(FIRST, make_kv(FIRST, seed=1), notes(1.0))
        store.variants.put(SECOND, make_kv(SECOND, seed=2), notes(2.0))


def test_variants_are_those_that_were_put(store: ChunkStore, reference: MemoryStore) -> None:
    fill(store, reference)
    found = store.variants.find(ONE)
    assert found == store.variants.find(FIRST) and plain(found) == plain(
        reference.variants.find(ONE)
    )
    assert {v.stored.key for v in found} == {FIRST, SECOND}
    assert {v.notes for v in found} == {notes(1.0), notes(2.0)}
    for variant in found:
        assert same(store.get(variant.stored.key), reference.get(variant.stored.key))


def test_variants_are_of_one_model_tenant_and_chunk(store: ChunkStore) -> None:
    fill(store)
    for other in (
        ChunkKey(OTHER, TOKENS),
        ChunkKey(MODEL, TOKENS, tenant="else"),
        ChunkKey(MODEL, (*TOKENS[:-1], 99)),
    ):
        assert store.variants.find(other) == []


def test_credit_adds_up_and_passes_over_what_is_gone(
    store: ChunkStore, reference: MemoryStore
) -> None:
    fill(store, reference)
    for each in (store, reference):
        each.variants.add_score({FIRST: 2.0, ONE: 5.0})
        each.variants.add_score({FIRST: 0.5, variant_key(MODEL, TOKENS, (9,)): 1.0})
    assert plain(store.variants.find(ONE)) == plain(reference.variants.find(ONE))
    assert {v.stored.key: v.score for v in store.variants.find(ONE)} == {FIRST: 2.5, SECOND: 0.0}


def test_notes_go_with_their_kv(store: ChunkStore) -> None:
    fill(store)
    store.delete(FIRST)
    assert [v.stored.key for v in store.variants.find(ONE)] == [SECOND]
    store.put(SECOND, make_kv(SECOND))
    assert store.variants.find(ONE) == []


def test_notes_that_cannot_be_are_refused(store: ChunkStore) -> None:
    short = ChunkNotes((), (), (0.1,), 0.5)
    with pytest.raises(ValueError, match="notes on 1 tokens of a chunk of 5"):
        store.variants.put(FIRST, make_kv(FIRST), short)
    with pytest.raises(ValueError, match="only KV under a variant_key has notes"):
        behind = ChunkKey(MODEL, TOKENS, (1,))
        store.variants.put(behind, make_kv(behind), notes(1.0))
    with pytest.raises(ValueError, match="1 chunks before, but 0 weights"):
        ChunkNotes((b"a",), (), (), 0.5)


def test_a_damaged_note_is_left_out(disk: DiskStore) -> None:
    fill(disk)
    rewrite(disk, "variants", FIRST.digest, lambda r: r[:-1] + bytes([r[-1] ^ 1]))
    assert [v.stored.key for v in disk.variants.find(ONE)] == [SECOND]
    rewrite(disk, "headers", SECOND.digest, lambda r: r[:-1])
    assert disk.variants.find(ONE) == []
