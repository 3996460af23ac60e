"""Measured speeds: fitted costs, recorded in the store, measured once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest

from ragcache.core.precompute import precompute
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import StoreError
from ragcache.planning import measure, profile
from ragcache.planning.context import encoding_context
from ragcache.planning.cost_model import Speeds
from ragcache.planning.profile import Profile
from ragcache.rag import RagCache
from ragcache.store import Catalog, ChunkKey, DiskStore
from ragcache.store.base import StoredChunk
from ragcache.store.tiers.ram import RamTier
from ragcache.types import KVPair
from tests import models, scene

SPEEDS = Speeds(
    *(0.1, 0.01, 0.001, 0.002, 0.003, 0.0004, 0.5),
    overlap_penalty=0.25,
    measured="today",
    decode_s={"int8": 0.1},
)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        yield cache


def test_prices_add_up() -> None:
    assert SPEEDS.compute_s(5, 100, 90) == pytest.approx(0.1 + 0.05 + 0.5 + 0.18)
    launched = replace(SPEEDS, launch_s=0.7)
    assert launched.compute_s(5, 100, 90) == pytest.approx(0.7 + 0.18)
    assert launched.compute_s(9, 100, 0) == SPEEDS.compute_s(9, 100, 0)
    assert SPEEDS.load_s(4, 10) == pytest.approx(0.012 + 0.004)


def test_json_and_back() -> None:
    assert Speeds.from_json(SPEEDS.as_json()) == SPEEDS


def record(**changes: object) -> str:
    return json.dumps(json.loads(SPEEDS.as_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        record(version=0),
        record(row_s="fast"),
        record(row_s=True),
        record(row_s=None),
        record(row_s=-1),
        record(row_s=nan),
        record(byte_s=inf),
        record(overlap_penalty=1.5),
        record(measured=3),
        record(another=1),
        record(decode_s=[]),
        record(decode_s={"int8": "fast"}),
        record(decode_s={"int8": -1}),
        record(link=None),
        json.dumps({k: v for k, v in json.loads(SPEEDS.as_json()).items() if k != "row_s"}),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Speeds.from_json(text)


def test_prices_are_found_again() -> None:
    costs = [
        (1, 16, 16 * 16, 0),
        (1, 64, 64 * 64, 0),
        (1, 16, 16 * 512, 496),
        (1, 64, 64 * 512, 448),
    ]
    seconds = [SPEEDS.compute_s(rows, pairs // rows, placed) for _, rows, pairs, placed in costs]
    assert measure._fit(costs, seconds) == pytest.approx([0.1, 0.01, 0.001, 0.002])


def test_what_launches_hide_is_found() -> None:
    """A GPU's prefill of few rows takes as long as its launches; a CPU's times add up."""
    shapes = [(16, 16), (256, 256), (4096, 4096), (16, 8192), (4096, 8192)]
    gpu = Speeds(0, 4e-5, 1e-9, 2e-7, 0, 0, 0, launch_s=0.03)
    cpu = Speeds(0.01, 4e-4, 1e-8, 2e-7, 0, 0, 0)
    for speeds in (gpu, cpu):
        runs = [(r, t, speeds.compute_s(r, t, t - r)) for r, t in shapes]
        found = measure._compute_speeds(runs)
        assert found.launch_s == pytest.approx(speeds.launch_s)
        for rows, total in ((1000, 1000), (1000, 8192), (30000, 30000)):
            placed = total - rows
            expected = speeds.compute_s(rows, total, placed)
            assert found.compute_s(rows, total, placed) == pytest.approx(expected, rel=0.01)
    assert measure._compute_speeds([(16, 16, 0.03)]).compute_s(16, 16, 0) == pytest.approx(0.03)


def test_no_price_is_negative() -> None:
    """The plain least squares would take 1 for each of a and -1 for each of b."""
    assert measure._fit([(1, 0), (2, 1), (3, 2)], [1, 1, 1]) == [
        pytest.approx(3 / 7, abs=0.1),
        0,
    ]
    assert measure._fit([(4, 8), (8, 16)], [1, 2]) != [0, 0]  # what cannot be told apart


def test_the_small_model_is_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    engine = TransformersEngine.load(tiny_model_dir)
    prefix = engine.template.prefix
    chunks = [engine.template.chunk(d.text) for d in scene.DOCUMENTS]
    keys = [ChunkKey(engine.fingerprint, prefix)]
    keys += [encoding_context("prefix", engine).key(engine.fingerprint, chunk) for chunk in chunks]
    with DiskStore(tmp_path) as store:
        made = Profile(engine, store, Catalog(store))
        assert made.measure(keys) is None  # nothing is stored
        precompute(engine, store, keys)
        speeds = made.measure(keys)
    assert speeds is not None
    for rows, total, placed in [(10, 10, 0), (100, 500, 400), (1000, 1000, 0)]:
        assert 0 < speeds.compute_s(rows, total, placed) < 60
    assert 0 < speeds.load_s(12, 100_000) < 10
    assert 0 < speeds.token_s < 10 and 0 <= speeds.overlap_penalty <= 1
    assert speeds.compute_s(1000, 1000, 0) > speeds.compute_s(100, 1000, 0)


def test_it_is_measured_once_and_kept(cache: RagCache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.speeds()
    assert first is not None and first.measured
    monkeypatch.setattr(profile, "measure_speeds", None)  # to call it would fail
    assert cache.speeds() is first
    again = Profile(cache.engine, cache.chunks, cache.catalog)
    assert again.speeds(list) == first  # another process reads what was recorded
    with monkeypatch.context() as patch:
        patch.setattr(cache.engine, "kernel_names", "triton, Flash")
        other = Profile(cache.engine, cache.chunks, cache.catalog)
        assert other.setting != again.setting and other.recorded() is None
    monkeypatch.setattr(profile, "measure_speeds", lambda *_: SPEEDS)
    anew = cache.speeds(anew=True)
    assert anew is not None and anew.row_s == SPEEDS.row_s
    assert again.recorded() == cache.speeds() == anew


def test_a_malformed_record_is_measured_again(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.catalog.put_setting(cache.profile.setting, '{"version": 1, "row_s": "fast"}')
    monkeypatch.setattr(profile, "measure_speeds", lambda *_: SPEEDS)
    speeds = cache.speeds()
    assert speeds is not None and replace(speeds, measured="today") == SPEEDS
    assert cache.profile.recorded() == speeds


def test_a_store_that_cannot_be_written_keeps_nothing(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, value: str) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(cache.catalog, "put_setting", fails)
    monkeypatch.setattr(profile, "measure_speeds", lambda *_: SPEEDS)
    assert cache.speeds() is not None
    assert cache.profile.recorded() is None


def test_what_is_recorded_is_for_one_model_and_one_way_to_store(tmp_path: Path) -> None:
    engines = models.engine("llama"), models.engine("llama", seed=1)
    with DiskStore(tmp_path / "a", layout="records") as records, DiskStore(tmp_path / "b") as auto:
        stores = records, auto, RamTier(auto, 1 << 20), RamTier(auto, 1 << 21)
        names = [
            Profile(engine, store, Catalog(auto)).setting for engine in engines for store in stores
        ]
    assert len(set(names)) == len(names)


def test_what_is_read_is_copied_to_the_device(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes as long as its copies, and what is placed is on the device already."""
    copied = list[KVPair]()
    finished = list[int]()

    class Copy:
        def __init__(self, parts: Sequence[KVPair]) -> None:
            self.parts = [(keys.clone(), values.clone()) for keys, values in parts]
            copied.extend(self.parts)

        def taken(self) -> list[KVPair]:
            return self.parts

        def finish(self) -> None:
            finished.append(len(copied))

    monkeypatch.setattr(cache.engine, "upload", Copy)
    assert isinstance(cache.engine, TransformersEngine)
    [key, *_] = cache.indexing.keys("holt")
    chunk = cache.store.get_header(key)
    assert isinstance(chunk, StoredChunk)
    assert measure._drained(cache.engine, cache.store, [chunk]) > 0
    assert len(copied) == chunk.spec.layers and finished
    zeros = measure._Zeros(cache.engine, [5, 3])
    assert all(
        mine is theirs
        for pair, there in zip(zeros.layer(0), copied[-2:], strict=True)
        for mine, theirs in zip(pair, there, strict=True)
    )
    assert cache.speeds(anew=True) is not None


def test_damaged_chunks_are_left_out(cache: RagCache) -> None:
    def flip(document: str) -> None:
        for key in cache.indexing.keys(document):
            with cache.store.tables.write() as txn:
                name = key.digest + bytes(2)
                raw = bytearray(txn.get("layers", name) or b"")
                raw[9] ^= 1
                txn.put("layers", name, bytes(raw))

    flip("holt")
    keys = cache.indexing.keys("holt")
    assert cache.profile.measure(keys) is None
    keys += [*cache.indexing.keys("mill"), *cache.indexing.keys("boats")]
    assert cache.profile.measure(keys) is not None


def test_a_tier_in_ram_is_measured_when_it_is_warm(tmp_path: Path) -> None:
    with scene.small(tmp_path, ram_bytes=1 << 24) as cache:
        cache.add(scene.DOCUMENTS)
        assert cache.speeds() is not None
        assert isinstance(cache.chunks, RamTier)
        assert cache.chunks.ram.hits > cache.chunks.ram.misses > 0
