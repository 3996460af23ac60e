"""Every codec keeps its bounds, states its sizes, and survives any bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ragcache.errors import ConfigError
from ragcache.store.format.codecs import CODECS
from ragcache.store.format.codecs.base import DTYPES
from ragcache.store.format.codecs.cachegen import CacheGen
from ragcache.store.format.codecs.entropy import TOTAL, bells
from ragcache.testing.codec import (
    LAYERS,
    CodecTests,
    Part,
    make_pair,
    rounding,
    spec_of,
    through,
)
from ragcache.types import KVSpec

CASTS = ["bfloat16", "float16"]


def rounded(name: str) -> Callable[[Tensor], Tensor]:
    """What a plane of numbers is in the dtype called ``name``."""
    return lambda plane: plane.to(DTYPES[name][0]).to(plane.dtype)


@pytest.mark.parametrize("name", CASTS)
def test_numbers_are_rounded_to_the_dtype(name: str) -> None:
    for dtype in DTYPES:
        pair = make_pair(dtype)
        assert all(map(torch.equal, through(CODECS[name], pair), map(rounded(name), pair)))
        assert CODECS[name].encode(*pair, 0, LAYERS).size == 2 * 2 * 2 * 21 * 8
    pair = make_pair(name)
    assert np.array_equal(
        CODECS[name].encode(*pair, 0, LAYERS), CODECS["raw"].encode(*pair, 0, LAYERS)
    )
    for bad in (float("nan"), float("inf"), torch.finfo(torch.float32).max):
        keys, values = make_pair()
        values[1, 2, 3] = bad
        with pytest.raises(ValueError, match="only codec 'raw'"):
            CODECS[name].encode(keys, values, 0, LAYERS)
    data = CODECS[name].encode(*pair, 0, LAYERS)
    data[-2:] = 0xFF
    with pytest.raises(ValueError, match="NaN or infinite"):
        CODECS[name].decode(data, spec_of(pair), 21, 0)


class TestRaw(CodecTests):
    codec = CODECS["raw"]


class TestBfloat16(CodecTests):
    codec = CODECS["bfloat16"]

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        return rounding(torch.bfloat16, numbers)


class TestFloat16(CodecTests):
    codec = CODECS["float16"]

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        return rounding(torch.float16, numbers)


class TestInt8(CodecTests):
    codec = CODECS["int8"]

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        return numbers.abs().amax(-1, keepdim=True) / 127 / 2


class TestFp8(CodecTests):
    codec = CODECS["fp8"]

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        peaks = numbers.abs().amax(-1, keepdim=True)
        return torch.maximum(numbers.abs() / 16, peaks / 448 / 1024)


class TestCacheGen(CodecTests):
    codec = CODECS["cachegen"]
    repeats = False

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        bins = CacheGen().bins(layer)[part == "values"]
        return numbers.abs().amax((0, 2), keepdim=True) / (bins // 2 - 1) / 2


def test_names_are_those_of_the_registry() -> None:
    assert {name: one.name for name, one in CODECS.items()} == {name: name for name in CODECS}


def test_every_codec_is_tested() -> None:
    assert {tests.codec for tests in CodecTests.__subclasses__()} >= set(CODECS.values())


@pytest.mark.parametrize("name", [name for name, one in CODECS.items() if not one.faithful])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_no_scale_can_hold_is_not_encoded(name: str, bad: float) -> None:
    keys, values = make_pair("float16")
    values[1, 2, 3] = bad
    with pytest.raises(ValueError, match="no answer may come from it"):
        CODECS[name].encode(keys, values, 0, LAYERS)


def test_entropy_coding_loses_no_symbol() -> None:
    pair = make_pair(heads=4, tokens=300)
    for layer in (0, 5, 11):
        for now, before, bins in zip(
            through(CODECS["cachegen"], pair, layer), pair, CacheGen().bins(layer), strict=True
        ):
            most = bins // 2 - 1
            peaks = before.abs().amax((0, 2), keepdim=True)
            assert torch.equal((before / peaks * most).round() / most * peaks, now)


def test_few_bytes_that_claim_many_numbers_are_refused() -> None:
    spec = KVSpec(LAYERS, 4096, 128, "bfloat16")  # 2^39 numbers: these tables are long enough
    data = np.zeros(8 + 2 * 2**19 * 2 + 2 * 2**19, np.uint8)
    data[:6] = np.frombuffer(b"cgn\x01\x20\x20", np.uint8)
    with pytest.raises(ValueError, match="cannot hold"):
        CODECS["cachegen"].decode(data, spec, 2**19, 0)


@pytest.mark.parametrize(
    ("name", "place", "byte", "why"),
    [
        ("int8", 0, 0, "do not begin"),
        ("int8", 3, 2, "do not begin"),
        ("int8", 4 + 3, 0xFF, "largest magnitude"),
        ("int8", -1, 0x80, "beyond the peak"),
        ("fp8", 0, 0, "do not begin"),
        ("fp8", 4 + 3, 0x80, "largest magnitude"),
        ("fp8", -1, 0xFF, "NaN"),
        ("cachegen", 0, 0, "do not begin"),
        ("cachegen", 4, 31, "31 bins"),
        ("cachegen", 4, 34, "34 bins"),
        ("cachegen", 5, 2, "2 bins"),
        ("cachegen", 8 + 3, 0x80, "largest magnitude"),
        ("cachegen", 8 + 2 * 21 * 4 + 16, 255, None),  # a bell, but not the one
        ("cachegen", -1, 0, None),
    ],
)
def test_a_changed_byte(name: str, place: int, byte: int, why: str | None) -> None:
    pair = make_pair("float32")
    data = CODECS[name].encode(*pair, 0, LAYERS)
    data[place] = byte
    if place > 6 and why == "largest magnitude":
        data[place - 1] |= 0x80  # all ones are NaN, or a number below zero
    with pytest.raises(ValueError, match=why):
        CODECS[name].decode(data, spec_of(pair), 21, 0)


def test_a_bell_that_is_none_is_refused() -> None:
    pair = make_pair("float32")
    data = CODECS["cachegen"].encode(*pair, 11, LAYERS)  # 16 bins for values: fewer bells
    assert len(bells(15).weights) < 255
    data[8 + 2 * 21 * 4 + 16] = 255
    with pytest.raises(ValueError, match="without a distribution"):
        CODECS["cachegen"].decode(data, spec_of(pair), 21, 11)


def test_cachegen_takes_far_fewer_bytes_than_int8() -> None:
    pair = make_pair("bfloat16", heads=4, tokens=128, dim=32)
    sizes = {name: CODECS[name].encode(*pair, 11, LAYERS).size for name in CODECS}
    assert sizes["cachegen"] * 2 < sizes["int8"] == sizes["fp8"]


def test_levels_are_in_the_bytes() -> None:
    coarse = CacheGen(value_first_layers=0, value_second_bins=8)
    pair = make_pair()
    data = coarse.encode(*pair, 0, LAYERS)
    assert data.size < CODECS["cachegen"].encode(*pair, 0, LAYERS).size
    _, now = CODECS["cachegen"].decode(data, spec_of(pair), 21, 0)
    assert len(torch.unique((now / pair[1].abs().amax((0, 2), keepdim=True) * 3).round())) == 7
    with pytest.raises(ValueError, match="7 bins: they must be even"):
        CacheGen(value_first_bins=7)


@pytest.mark.parametrize("levels", range(3, 33, 2))
def test_bells_are_whole_numbers(levels: int) -> None:
    family = bells(levels)
    assert len(family.weights) <= 256
    weights = family.weights.astype(np.int64)
    assert (weights == family.weights).all() and (weights > 0).all()
    assert (weights.sum(1) == TOTAL - levels).all()
    assert family.bits.min() >= 1 / 16  # what bounds the memory that bytes can claim


def test_the_formats_stay_what_they_are() -> None:
    """Bytes that an earlier release may have written: a change here needs a new tag."""
    spec = KVSpec(LAYERS, 1, 4, "bfloat16")
    keys = torch.tensor([[[0.5, -1, 2, 0], [0.25, -0.75, 1.5, 0.125], [0, 0, 0, 0]]]).bfloat16()
    for name, written in WRITTEN.items():
        data = CODECS[name].encode(keys, -keys, 2, LAYERS)
        assert data.tobytes().hex() == written
        again = CODECS[name].decode(data.copy(), spec, 3, 2)
        assert all(map(torch.equal, again, through(CODECS[name], (keys, -keys), 2)))


WRITTEN = {
    "raw": "003f80bf00400000803e40bfc03f003e0000000000000000"
    "00bf803f00c0008080be403fc0bf00be0080008000800080",
    "int8": "693873010040c03f00000040c03f000020c07f0015c07f0b00000000e0408100eb4081f500000000",
    "fp8": "663873010040c03f00000040c03f00006ef67e0069f67e6100000000ee76fe80e976fee180808080",
    "cachegen": "63676e01201000000040c03f00000040c03f0000d9f8fe323b667116f187fa48b3196a184fd03b00",
}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    pair = make_pair()
    data = CODECS["cachegen"].encode(*pair, 0, LAYERS)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[codecs\]'"):
        CODECS["cachegen"].encode(*pair, 0, LAYERS)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[codecs\]'"):
        CODECS["cachegen"].decode(data, spec_of(pair), 21, 0)
