"""What is planned on modelled devices: near the best, though speeds are only measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ragcache.planning import measure
from ragcache.planning.controller import Alternative, PrefillCost, plan
from ragcache.planning.cost_model import Speeds
from ragcache.planning.measure import measure_speeds

CHUNK = 256  # tokens


@dataclass(frozen=True)
class Device:
    """A device with a model on it, and a store: times in seconds, as of a roofline."""

    launches: float  # to launch the kernels of a forward pass, while which the device computes
    row: float  # to compute a row
    pair: float  # to compute the attention of a row to a row
    place: float  # to place a loaded row
    kv_bytes: int  # of a token
    layers: int
    read: float  # to read a layer of a chunk
    byte: float  # to read a byte, and copy it to the device
    context: int = 1 << 17

    def compute(self, rows: float, total: int, placed: int) -> float:
        computing = rows * self.row + rows * total * self.pair
        return max(self.launches, computing) + placed * self.place

    def load(self, chunks: int) -> float:
        return chunks * (self.layers * self.read + CHUNK * self.kv_bytes * self.byte)

    def first_token(self, chunks: int, loaded: int, question: int, ratio: float) -> float:
        rows = question + CHUNK * (chunks - loaded + ratio * loaded)
        total = question + CHUNK * chunks
        return max(self.load(loaded), self.compute(rows, total, CHUNK * loaded))


#: 400 TFLOP/s; 8B parameters in bfloat16, of Llama 3.1's shape.
H100 = Device(
    *(0.03, 16e9 / 400e12, 4 * 4096 * 32 / 400e12, 131072 * 3 / 2e12, 131072, 32),
    read=20e-6,
    byte=1 / 45e9,  # from pinned memory
)
SMALL_ON_H100 = replace(
    H100, launches=0.02, row=1e9 / 300e12, pair=4 * 896 * 24 / 300e12, kv_bytes=12288, layers=24
)
CPU = Device(
    *(0.004, 2 * 135e6 / 80e9, 4 * 576 * 30 / 40e9, 2e-6, 46080, 30),
    read=30e-6,
    byte=1 / 2e9,
    context=8192,
)
DEVICES = {
    "H100": H100,
    "H100, a slow disk": replace(H100, byte=1 / 0.5e9),
    "H100, a fast link": replace(H100, read=300e-6, byte=1 / 12e9),
    "H100, a small model": SMALL_ON_H100,
    "H100, a short context": replace(SMALL_ON_H100, context=2048),
    "CPU": CPU,
    "CPU, a slow disk": replace(CPU, byte=1 / 0.1e9),
}


def measured(device: Device, monkeypatch: pytest.MonkeyPatch) -> Speeds:
    """The speeds that are measured on a device."""
    clock = SimpleNamespace(now=0.0)

    def fused(engine: object, lengths: Sequence[int], rows: int, source: object) -> Any:
        placed = sum(lengths)
        prefilled = SimpleNamespace(tokens=rows + placed)
        return device.compute(rows, rows + placed, placed), SimpleNamespace(prefilled=prefilled)

    def decode(prefilled: Any, sampling: object) -> Iterator[int]:
        for _ in range(8):
            clock.now += device.compute(1, prefilled.tokens, 0)
            yield 0

    def readings(
        _: object, store: object, batches: list[list[Any]]
    ) -> list[tuple[int, int, float]]:
        return [
            (len(b) * device.layers, sum(c.payload_bytes for c in b), device.load(len(b)))
            for b in batches
        ]

    sample = [
        SimpleNamespace(key=number, payload_bytes=CHUNK * device.kv_bytes, tokens=CHUNK)
        for number in range(9)
    ]
    engine = SimpleNamespace(context_tokens=device.context, decode=decode)
    monkeypatch.setattr(measure, "_fused", fused)
    monkeypatch.setattr(measure, "_Zeros", lambda *_: None)
    monkeypatch.setattr(measure, "_readings", readings)
    monkeypatch.setattr(measure, "_overlap_penalty", lambda *_: 0.0)
    monkeypatch.setattr("ragcache.planning.measure.time.perf_counter", lambda: clock.now)
    store = SimpleNamespace(remote_codecs=())
    speeds = measure_speeds(cast(Any, engine), cast(Any, store), cast(Any, sample))
    assert speeds is not None
    return speeds


def planned(device: Device, speeds: Speeds, chunks: int, question: int) -> tuple[int, float]:
    """How many of the chunks are loaded, and the ratio."""
    stored = Alternative(CHUNK * device.kv_bytes)
    cost = PrefillCost(0, (CHUNK,) * chunks, question, (), ((stored,),) * chunks, device.layers)
    made = plan(cost, speeds)
    return chunks - len(made.recompute), made.ratio


@pytest.mark.parametrize("name", DEVICES)
def test_the_plan_is_near_the_best(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = DEVICES[name]
    speeds = measured(device, monkeypatch)
    for tokens in (1024, 2048, 4096, 8192, 32768, 126 * 1024):
        if tokens > device.context:
            continue
        chunks, question = tokens // CHUNK - 1, 64
        loaded, ratio = planned(device, speeds, chunks, question)
        took = device.first_token(chunks, loaded, question, ratio)
        best = min(device.first_token(chunks, n, question, 0.15) for n in range(chunks + 1))
        assert took <= 1.1 * best, (tokens, loaded, ratio, took, best)


def test_a_fast_gpu_reuses_all_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = measured(H100, monkeypatch)
    for tokens in (8192, 32768):
        chunks = tokens // CHUNK
        loaded, ratio = planned(H100, speeds, chunks, 64)
        assert loaded == chunks and ratio == pytest.approx(0.15)
        took = H100.first_token(chunks, loaded, 64, ratio)
        assert took < H100.first_token(chunks, 0, 64, 0) / 4
