"""Layers in order, a bounded number of bytes ahead, and errors raised where a layer is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ragcache.errors import StoreError
from ragcache.store import (
    ChunkKey,
    ChunkStore,
    DiskStore,
    LayerReader,
    MemoryStore,
    StoredChunk,
    prefetch,
)
from ragcache.store.key import with_codec
from ragcache.types import KVSpec
from tests.store.samples import DIM, HEADS, LAYERS, make_key, make_kv, rewrite_layer

KEYS = [make_key(first) for first in range(3)]
SPEC = KVSpec(LAYERS, HEADS, DIM, "float32")
LAYER_BYTES = 3 * SPEC.layer_bytes(5)


class Watched(MemoryStore):
    """Notes which layers were asked for; reads wait while ``gate`` is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        for key in KEYS:
            self.put(key, make_kv(key))

    def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
        self.asked.append(layer)
        assert self.gate.wait(10)
        return super().layer(key, layer)


def settled(store: Watched, reads: int) -> bool:
    """Were exactly so many layers asked for, once nothing moves any more?"""
    until = time.monotonic() + 5
    while len(store.asked) < reads and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(store.asked) == reads


def resolve(store: ChunkStore, keys: list[ChunkKey] = KEYS) -> list[StoredChunk]:
    return [found for key in keys if isinstance(found := store.get_header(key), StoredChunk)]


def started(
    store: ChunkStore, found: list[StoredChunk] | None = None, **options: Any
) -> LayerReader:
    reader = LayerReader(store, resolve(store) if found is None else found, **options)
    reader.start(range(LAYERS))
    return reader


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where threads read ahead."""
    monkeypatch.setattr(prefetch, "usable_cores", lambda: 64)


@pytest.mark.parametrize("ahead", [0, LAYER_BYTES, 1 << 30])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_layer_of_every_chunk_in_order(store: ChunkStore, ahead: int, workers: int) -> None:
    for key in KEYS:
        store.put(key, make_kv(key))
    with started(store, workers=workers, ahead_bytes=ahead) as reader:
        for layer in range(LAYERS):
            for key, (keys, values) in zip(KEYS, reader.layer(layer), strict=True):
                kv = make_kv(key)
                assert torch.equal(keys, kv.keys[layer])
                assert torch.equal(values, kv.values[layer])
            load = reader.load(layer)
            assert load.bytes == LAYER_BYTES and load.began <= load.ended


def test_it_reads_ahead_before_anything_is_asked(watched: Watched) -> None:
    with LayerReader(watched, resolve(watched)) as reader:
        assert settled(watched, 0)
        reader.start(range(LAYERS))
        assert settled(watched, LAYERS * len(KEYS))


def test_on_few_cores_layers_are_read_when_they_are_taken(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "usable_cores", lambda: 2)
    readers = []

    class Noting(Watched):
        def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
            readers.append(threading.current_thread())
            return super().layer(key, layer)

    noting = Noting()
    with started(noting) as reader:
        assert settled(noting, 0)
        reader.layer(0)
        assert noting.asked == [0] * len(KEYS)
    assert set(readers) == {threading.current_thread()}


@pytest.mark.parametrize("what", ["a device", "a remote", "a codec that decodes"])
def test_on_few_cores_threads_read_what_takes_time(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(prefetch, "usable_cores", lambda: 2)
    found = resolve(watched)
    options: dict[str, Any] = {}
    if what == "a device":
        options["upload"] = lambda pairs: pairs
    elif what == "a remote":
        found = [replace(chunk, is_remote=True) for chunk in found]
    else:
        found = [replace(chunk, key=with_codec(chunk.key, "cachegen")) for chunk in found]
    with LayerReader(watched, found, **options) as reader:
        assert reader._pool is not None


def test_only_the_layers_it_was_started_for_are_read(watched: Watched) -> None:
    with LayerReader(watched, resolve(watched)) as reader:
        with pytest.raises(ValueError, match=r"layer 0 asked for; to come are \[\]"):
            reader.layer(0)
        reader.start([1])
        assert torch.equal(reader.layer(1)[0][0], make_kv(KEYS[0]).keys[1])
        with pytest.raises(ValueError, match="has been started"):
            reader.start([2])
    assert set(watched.asked) == {1}


@pytest.mark.parametrize(
    ("ahead", "layers"), [(0, 1), (2 * LAYER_BYTES - 1, 1), (2 * LAYER_BYTES, 2)]
)
def test_it_holds_no_more_than_ahead_bytes(watched: Watched, ahead: int, layers: int) -> None:
    with started(watched, ahead_bytes=ahead) as reader:
        assert settled(watched, layers * len(KEYS))
        reader.layer(0)
        assert settled(watched, (layers + 1) * len(KEYS))


def test_it_is_no_more_layers_ahead_than_it_may(watched: Watched) -> None:
    with started(watched, ahead=2) as reader:
        assert settled(watched, 2 * len(KEYS))
        reader.layer(0)
        assert settled(watched, 3 * len(KEYS))


def test_reading_is_timed(watched: Watched) -> None:
    watched.gate.clear()
    with started(watched) as reader:
        threading.Timer(0.05, watched.gate.set).start()
        reader.layer(0)
        assert 0.02 < reader.load(0).ended - reader.load(0).began < 5


def test_layers_are_asked_for_once_in_order(watched: Watched) -> None:
    with started(watched) as reader:
        with pytest.raises(ValueError, match=r"layer 1 asked for; to come are \[0, 1, 2\]"):
            reader.layer(1)
        for layer in range(LAYERS):
            reader.layer(layer)
        for layer in (0, LAYERS):
            with pytest.raises(ValueError, match=r"to come are \[\]"):
                reader.layer(layer)


def test_an_unreadable_record_surfaces_where_it_is_asked_for(disk: DiskStore) -> None:
    for key in KEYS:
        disk.put(key, make_kv(key))
    found = resolve(disk)
    rewrite_layer(disk, KEYS[1], 1, lambda raw: b"damage")
    with started(disk, found) as reader:
        reader.layer(0)
        with pytest.raises(StoreError) as caught:
            reader.layer(1)
        assert (caught.value.key, caught.value.reason) == (KEYS[1].digest, "truncated")
        with pytest.raises(StoreError, match="reader is closed"):
            reader.layer(1)


def test_a_chunk_deleted_meanwhile_is_absent(watched: Watched) -> None:
    found = resolve(watched)
    watched.delete(KEYS[2])
    with started(watched, found) as reader:
        with pytest.raises(StoreError) as caught:
            reader.layer(0)
    assert (caught.value.key, caught.value.reason) == (KEYS[2].digest, "absent")


def test_a_chunk_replaced_by_another_shape_is_foreign(watched: Watched) -> None:
    wide = [replace(found, spec=replace(SPEC, head_dim=2 * DIM)) for found in resolve(watched)]
    with started(watched, wide) as reader:
        with pytest.raises(StoreError) as caught:
            reader.layer(0)
    assert caught.value.reason == "foreign"


def test_leaving_drops_what_is_outstanding(watched: Watched) -> None:
    watched.gate.clear()
    with started(watched, workers=1) as reader:
        assert settled(watched, 1)
        threading.Timer(0.02, watched.gate.set).start()
    assert watched.asked == [0] * len(KEYS)  # what was begun is ended
    with pytest.raises(StoreError, match="reader is closed"):
        reader.layer(0)


def test_a_shared_pool_outlives_its_readers(watched: Watched) -> None:
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            with started(watched, pool=pool) as reader:
                reader.layer(0)
        assert pool.submit(int, "1").result() == 1


def test_the_store_may_be_closed_right_after(tmp_path: Path) -> None:
    for turn in range(5):
        with DiskStore(tmp_path / f"{turn}") as store:
            for key in KEYS:
                store.put(key, make_kv(key))
            with started(store) as reader:
                reader.layer(0)
        with DiskStore(tmp_path / f"{turn}", readonly=True) as store:  # nothing holds it open
            assert store.verify() == {} and all(map(store.has, KEYS))


def test_no_chunks_no_layers_to_load(watched: Watched) -> None:
    with started(watched, []) as reader:
        assert [reader.layer(layer) for layer in range(LAYERS)] == [[]] * LAYERS
        assert reader.load(0).bytes == 0


class Copies:
    """What an engine on a device does with a layer: notes what becomes of it."""

    def __init__(self) -> None:
        self.finished: list[int] = []
        self.begun = 0

    def __call__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Copy:
        self.begun += 1
        return Copy(self, self.begun - 1, parts)


class Copy:
    def __init__(self, copies: Copies, number: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.copies, self.number, self.parts = copies, number, parts

    def taken(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys + 1, values + 1) for keys, values in self.parts]

    def finish(self) -> None:
        self.copies.finished.append(self.number)


def test_a_layer_is_handed_over_as_it_is_on_the_device(watched: Watched) -> None:
    """And its memory on the host is given back only once it was copied from."""
    copies = Copies()
    with started(watched, workers=1, ahead=1, upload=copies) as reader:
        for layer in range(LAYERS):
            for key, (keys, _) in zip(KEYS, reader.layer(layer), strict=True):
                assert torch.equal(keys, make_kv(key).keys[layer] + 1)
            assert copies.finished == list(range(layer))
    assert copies.finished == list(range(LAYERS))


def test_chunks_of_another_spec_are_refused(watched: Watched) -> None:
    with pytest.raises(ValueError, match="among chunks of"):
        LayerReader(watched, resolve(watched), replace(SPEC, layers=9))
    first, second, *_ = resolve(watched)
    with pytest.raises(ValueError, match="among chunks of KVSpec"):
        LayerReader(watched, [first, replace(second, spec=replace(SPEC, layers=9))])


def test_the_bytes_of_a_layer_are_those_that_were_read(tmp_path: Path) -> None:
    """An entropy coder makes other lengths of other layers."""
    pytest.importorskip("constriction")
    key = with_codec(KEYS[0], "cachegen")
    kv = make_kv(key)
    flat = replace(
        kv, keys=(kv.keys[0] * 0, *kv.keys[1:]), values=(kv.values[0] * 0, *kv.values[1:])
    )
    with DiskStore(tmp_path / "store") as store:
        store.put(key, flat)
        found = store.get_header(key)
        assert isinstance(found, StoredChunk) and found.layer_sizes[0] < found.layer_sizes[1]
        assert sum(found.layer_sizes) == found.payload_bytes == store.stats().payload_bytes
        with LayerReader(store, [found]) as reader:
            reader.start(range(LAYERS))
            for layer in range(LAYERS):
                reader.layer(layer)
                assert reader.load(layer).bytes == found.layer_sizes[layer]
