"""What the RAM tier holds, and that it never returns other KV than the store below."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ragcache.errors import ConfigError, StoreError
from ragcache.store import (
    ChunkKey,
    ChunkStore,
    DiskStore,
    LayerReader,
    MemoryStore,
    Miss,
    StoredChunk,
)
from ragcache.store.tiers.ram import RamStats, RamTier
from ragcache.types import ChunkKV
from tests.store.samples import CHUNK_BYTES, LAYERS, make_key, make_kv, rewrite_layer

A, B, C = KEYS = [make_key(first) for first in range(3)]
LAYER_BYTES = CHUNK_BYTES // LAYERS


class Below(MemoryStore):
    """Full; notes what was read, and runs ``meanwhile`` once, when a read has been done."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[ChunkKey, int]] = []
        self.meanwhile: Callable[[], object] = lambda: None
        for key in KEYS:
            self.put(key, make_kv(key))

    def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
        pair = super().layer(key, layer)
        self.reads.append((key, layer))
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return pair


@pytest.fixture
def below() -> Below:
    return Below()


def walk(store: ChunkStore, *keys: ChunkKey) -> None:
    """Read the chunks as a prompt does, and compare with what was put."""
    for layer in range(LAYERS):
        for key in keys:
            assert is_layer(store, key, layer, make_kv(key))


def is_layer(store: ChunkStore, key: ChunkKey, layer: int, kv: ChunkKV) -> bool:
    keys, values = store.layer(key, layer)
    return torch.equal(keys, kv.keys[layer]) and torch.equal(values, kv.values[layer])


def agrees(store: RamTier, key: ChunkKey, layer: int) -> bool:
    """Whether the tier and the store below return the same."""
    if not store.below.has(key):
        with pytest.raises(StoreError) as caught:
            store.layer(key, layer)
        return caught.value.reason == "absent"
    pairs = zip(store.layer(key, layer), store.below.layer(key, layer), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_what_was_read_comes_from_ram(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    for _ in range(3):
        walk(store, A, B)
    assert len(below.reads) == 2 * LAYERS
    assert store.ram == RamStats(
        hits=4 * LAYERS, misses=2 * LAYERS, evictions=0, held_bytes=2 * CHUNK_BYTES
    )


def test_a_layer_from_ram_is_the_callers_own(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    for _ in range(3):  # what was read below, then what was held
        for tensor in store.layer(A, 0):
            tensor.fill_(7)
    assert is_layer(store, A, 0, make_kv(A)) and store.ram.hits == 3


def test_copies_that_are_in_use_do_not_share_memory(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    for _ in range(3):  # the second and third in memory that the one before has left
        taken = [(key, store.layer(key, layer)) for layer in range(LAYERS) for key in KEYS]
        views = [keys[:, 1:] for _, (keys, _) in taken]
        del taken
        more = [store.layer(key, layer) for layer in range(LAYERS) for key in KEYS]
        for pair in more:
            for tensor in pair:
                tensor.fill_(7)
        kept = [make_kv(key).keys[layer][:, 1:] for layer in range(LAYERS) for key in KEYS]
        assert all(map(torch.equal, views, kept))


def test_the_memory_of_a_copy_is_used_again(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    walk(store, A)
    places = {store.layer(A, layer)[0].data_ptr() for layer in range(LAYERS) for _ in range(5)}
    assert len(places) == 1


def test_the_least_recently_used_chunk_goes(below: Below) -> None:
    store = RamTier(below, 2 * CHUNK_BYTES)
    for key in (A, B, A, C):
        walk(store, key)
    assert store.ram.evictions == 1 and store.ram.held_bytes == 2 * CHUNK_BYTES
    below.reads.clear()
    walk(store, A, C)
    assert below.reads == []
    walk(store, B)
    assert len(below.reads) == LAYERS


def test_a_chunk_that_does_not_fit_passes_through(below: Below) -> None:
    store = RamTier(below, CHUNK_BYTES - 1)
    walk(store, A)
    walk(store, A)
    assert store.ram == RamStats(hits=0, misses=2 * LAYERS, evictions=0, held_bytes=0)


def test_chunks_that_do_not_fit_together_do_not_push_each_other_out_at_every_layer(
    below: Below,
) -> None:
    store = RamTier(below, 2 * CHUNK_BYTES)
    walk(store, A, B, C)
    assert store.ram.evictions == 1 and store.ram.held_bytes == 2 * CHUNK_BYTES
    below.reads.clear()
    walk(store, B, C)
    assert below.reads == []


def test_a_prompt_that_was_given_up_is_read_to_the_end_by_the_next(below: Below) -> None:
    store = RamTier(below, CHUNK_BYTES)
    store.layer(A, 0)
    assert store.ram.held_bytes == LAYER_BYTES
    walk(store, A)
    assert below.reads == [(A, 0), (A, 1), (A, 2)]


def test_a_reader_with_threads(below: Below) -> None:
    store = RamTier(below, 2 * CHUNK_BYTES)
    chunks = [found for key in KEYS if isinstance(found := store.get_header(key), StoredChunk)]
    for _ in range(5):
        with LayerReader(store, chunks) as reader:
            reader.start(range(LAYERS))
            for layer in range(LAYERS):
                for (keys, values), key in zip(reader.layer(layer), KEYS, strict=True):
                    assert torch.equal(keys, make_kv(key).keys[layer])
                    assert torch.equal(values, make_kv(key).values[layer])
        assert store.ram.held_bytes <= 2 * CHUNK_BYTES
    assert store.ram.hits + store.ram.misses == 5 * 3 * LAYERS


CHANGES: dict[str, Callable[[RamTier], object]] = {
    "put": lambda store: store.put(A, like(make_kv(A, seed=1))),
    "delete": lambda store: store.delete(A),
    "delete and put": lambda store: delete_and_put(store),
    "put below": lambda store: store.below.put(A, make_kv(A, seed=1)),
    "put below with other layers": lambda store: store.below.put(
        A, make_kv(A, dtype=torch.float16)
    ),
    "delete below": lambda store: store.below.delete(A),
    "forget": lambda store: forget(store),
}


def like(kv: ChunkKV) -> ChunkKV:
    """``kv``, which no header tells from that of seed 0."""
    return replace(kv, sensitivity=make_kv(A).sensitivity)


def delete_and_put(store: RamTier) -> None:
    store.delete(A)
    store.put(A, like(make_kv(A, seed=1)))


def forget(store: RamTier) -> None:
    with store.change() as change:
        change.delete(A.digest)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_at_once(below: Below, change: Callable[[RamTier], object]) -> None:
    store = RamTier(below, 1 << 20)
    walk(store, A, B)
    change(store)
    assert all(agrees(store, A, layer) for layer in (1, 0, 2, 1, 0))
    walk(store, B)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_during_a_read_is_not_missed(
    below: Below, change: Callable[[RamTier], object]
) -> None:
    store = RamTier(below, 1 << 20)
    below.meanwhile = lambda: change(store)
    assert is_layer(store, A, 0, make_kv(A))  # read before the change
    assert agrees(store, A, 0) and agrees(store, A, 0)


def test_a_deleted_chunk_takes_no_room(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    walk(store, A, B)
    store.delete(A)
    assert store.ram.held_bytes == CHUNK_BYTES


def test_a_replacement_that_comes_and_goes_does_not_break_the_account() -> None:
    class Flickering(MemoryStore):
        def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
            self.put(key, make_kv(key, dtype=torch.float16))
            try:
                return super().layer(key, layer)
            finally:
                self.put(key, make_kv(key))

    store = RamTier(Flickering(), CHUNK_BYTES)
    store.put(A, make_kv(A))
    for _ in range(2):
        assert store.layer(A, 0)[0].dtype == torch.float16  # what was there when it was read
        assert store.ram.held_bytes == 0


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_record_that_looks_the_same_is_noticed(kind: str, tmp_path: Path) -> None:
    under = MemoryStore() if kind == "memory" else DiskStore(tmp_path / "store")
    with RamTier(under, 1 << 20) as store:
        store.put(A, make_kv(A))
        walk(store, A)
        store.below.put(A, like(make_kv(A, seed=1)))
        assert agrees(store, A, 0)


def test_a_record_that_is_found_damaged_is_dropped(tmp_path: Path) -> None:
    with RamTier(DiskStore(tmp_path / "store"), 1 << 20) as store:
        assert isinstance(store.below, DiskStore)
        store.put(A, make_kv(A))
        walk(store, A)
        rewrite_layer(store.below, A, 1, lambda raw: raw[::-1])
        assert list(store.verify()) == [A.digest.hex()]
        with pytest.raises(StoreError, match="is corrupt: .*checksum"):
            store.layer(A, 1)
        assert store.verify(repair=True) and isinstance(store.get_header(A), Miss)
        assert store.ram.held_bytes == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_calls(below: Below, seed: int) -> None:
    rng = random.Random(seed)
    room = rng.choice([0, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES])
    store = RamTier(below, room)
    for step in range(200):
        key, layer, kind = rng.choice(KEYS), rng.randrange(LAYERS), rng.random()
        kv = make_kv(key, seed=step)
        if kind < 0.7:
            assert agrees(store, key, layer)
        elif kind < 0.9:
            rng.choice([store, below]).put(key, kv)
        else:
            rng.choice([store, below]).delete(key)
        assert store.ram.held_bytes <= room


@pytest.mark.parametrize("seed", range(3))
def test_any_calls_of_many_threads(below: Below, seed: int) -> None:
    room = 2 * CHUNK_BYTES
    store = RamTier(below, room)
    known = {key: [make_kv(key, seed) for seed in range(4)] for key in KEYS}

    def work(number: int) -> int:
        rng, seen = random.Random(1000 * seed + number), 0
        for _ in range(100):
            key, layer, kind = rng.choice(KEYS), rng.randrange(LAYERS), rng.random()
            if kind < 0.1:
                store.put(key, rng.choice(known[key]))
            elif kind < 0.15:
                store.delete(key)
            else:
                try:
                    keys, values = store.layer(key, layer)
                except StoreError as error:
                    assert error.reason == "absent"
                    continue
                seen += 1
                one = [kv for kv in known[key] if torch.equal(kv.keys[layer], keys)]
                assert len(one) == 1 and torch.equal(one[0].values[layer], values)
            assert store.ram.held_bytes <= room
        return seen

    with ThreadPoolExecutor(5) as pool:
        seen = sum(pool.map(work, range(5)))
    assert store.ram.hits + store.ram.misses >= seen > 0
    assert all(agrees(store, key, layer) for key in KEYS for layer in range(LAYERS))


def test_looks_at_the_header_are_not_counted_as_hits(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    store.get_header(A)
    walk(store, A, B)
    walk(store, A, B)
    with pytest.raises(StoreError):
        store.layer(make_key(50), 0)
    assert store.stats().hits == 1 and store.stats().misses == {"absent": 1}


def test_closing_lets_go(below: Below) -> None:
    with RamTier(below, 1 << 20) as store:
        walk(store, A)
    assert store.ram.held_bytes == 0
    with pytest.raises(StoreError, match="is closed: open it again"):
        below.get_header(A)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="max_bytes is -1"):
        RamTier(MemoryStore(), -1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_pinning_needs_cuda() -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        RamTier(MemoryStore(), 1, pin=True)


@pytest.mark.gpu
def test_what_is_lent_is_pinned(below: Below) -> None:
    store = RamTier(below, CHUNK_BYTES, pin=True)
    found = store.get_header(A)
    assert isinstance(found, StoredChunk)
    for _ in range(2):
        assert all(tensor.is_pinned() for tensor in store.layers([found], 0)[0])
    walk(store, A)


def test_what_is_lent_is_what_is_held(below: Below) -> None:
    store = RamTier(below, 1 << 20)
    found = [one for one in map(store.get_header, KEYS) if isinstance(one, StoredChunk)]
    first, again = store.layers(found, 0), store.layers(found, 0)
    for key, pair, same in zip(KEYS, first, again, strict=True):
        kv = make_kv(key)
        assert torch.equal(pair[0], kv.keys[0]) and torch.equal(pair[1], kv.values[0])
        assert [t.data_ptr() for t in pair] == [t.data_ptr() for t in same]
    assert len(below.reads) == len(KEYS)


def test_what_is_lent_stays_when_its_chunk_goes(below: Below) -> None:
    store = RamTier(below, CHUNK_BYTES)
    found = store.get_header(A)
    assert isinstance(found, StoredChunk)
    keys, _ = store.layers([found], 0)[0]
    store.delete(A)
    walk(store, B, C)
    assert torch.equal(keys, make_kv(A).keys[0])
