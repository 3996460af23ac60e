"""Every codec keeps its bounds, states its sizes, and survives any bytes."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ragcache.errors import ConfigError
from ragcache.store.format.codecs import CODECS, codec
from ragcache.store.format.codecs.base import DTYPES, Bytes
from ragcache.store.format.codecs.cachegen import CacheGen
from ragcache.store.format.codecs.entropy import TOTAL, bells
from ragcache.types import KVPair, KVSpec

LAYERS = 12
CASTS = ["bfloat16", "float16"]
LOSSY = [name for name, one in CODECS.items() if not one.faithful]
BYTEWISE = ["int8", "fp8"]

every_codec = pytest.mark.parametrize("name", CODECS)
lossy = pytest.mark.parametrize("name", LOSSY)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_pair(
    dtype: str = "float32", heads: int = 2, tokens: int = 21, dim: int = 8, seed: int = 0
) -> KVPair:
    """Keys and values whose channels have centres and spreads of their own."""
    generator = torch.Generator().manual_seed(seed)
    centres, spreads = torch.randn(2, 2, heads, 1, dim, generator=generator)
    noise = torch.randn(2, heads, tokens, dim, generator=generator)
    keys, values = (centres + spreads * noise).to(DTYPES[dtype][0])
    return keys, values


def spec_of(pair: KVPair) -> KVSpec:
    heads, _, dim = pair[0].shape
    return KVSpec(LAYERS, heads, dim, str(pair[0].dtype).removeprefix("torch."))


def through(name: str, pair: KVPair, layer: int = 0) -> KVPair:
    """What a pair comes back as."""
    data = codec(name).encode(*pair, layer, LAYERS)
    return codec(name).decode(data.copy(), spec_of(pair), pair[0].shape[1], layer)


def rounded(name: str) -> Callable[[Tensor], Tensor]:
    """What a plane of numbers is in the dtype called ``name``."""
    return lambda plane: plane.to(DTYPES[name][0]).to(plane.dtype)


@pytest.mark.parametrize("name", CASTS)
def test_numbers_are_rounded_to_the_dtype(name: str) -> None:
    for dtype in DTYPES:
        pair = make_pair(dtype)
        assert all(map(torch.equal, through(name, pair), map(rounded(name), pair)))
        assert codec(name).encode(*pair, 0, LAYERS).size == 2 * 2 * 2 * 21 * 8
    pair = make_pair(name)
    assert np.array_equal(
        codec(name).encode(*pair, 0, LAYERS), codec("raw").encode(*pair, 0, LAYERS)
    )
    for bad in (float("nan"), float("inf"), torch.finfo(torch.float32).max):
        keys, values = make_pair()
        values[1, 2, 3] = bad
        with pytest.raises(ValueError, match="only codec 'raw'"):
            codec(name).encode(keys, values, 0, LAYERS)
    data = codec(name).encode(*pair, 0, LAYERS)
    data[-2:] = 0xFF
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec(name).decode(data, spec_of(pair), 21, 0)


def unit(dtype: torch.dtype, number: Tensor) -> Tensor:
    """By how much rounding to ``dtype`` may move ``number``, in float64."""
    info = torch.finfo(dtype)
    return number * info.eps / 2 + info.smallest_normal * info.eps / 2


def steps(name: str, plane: Tensor, bins: int) -> Tensor:
    """How far each number of keys or values may be off before it is rounded to its dtype."""
    if name == "cachegen":
        return plane.abs().amax((0, 2), keepdim=True) / (bins // 2 - 1) / 2
    peaks = plane.abs().amax(-1, keepdim=True)
    if name == "int8":
        return peaks / 127 / 2
    return torch.maximum(plane.abs() / 16, peaks / 448 / 1024)


def assert_within_bounds(name: str, pair: KVPair, layer: int = 0) -> None:
    for now, before, bins in zip(
        through(name, pair, layer), pair, CacheGen().bins(layer), strict=True
    ):
        assert now.dtype == before.dtype and now.shape == before.shape
        wide = before.double()
        allowed = steps(name, wide, bins) * (1 + 1e-5) + unit(before.dtype, wide.abs() * 1.1)
        # the three float32 roundings, of which the last may be to a subnormal
        allowed = allowed + 4 * unit(torch.float32, wide.abs().amax())
        assert ((now.double() - wide).abs() <= allowed).all()


@every_dtype
@lossy
def test_no_number_is_off_by_more_than_stated(name: str, dtype: str) -> None:
    for layer in (0, 1, 2, 9, 10, 11):
        assert_within_bounds(name, make_pair(dtype, seed=layer), layer)


@every_dtype
@lossy
def test_extreme_numbers_keep_the_bounds(name: str, dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype][0])
    for size in (info.max, info.smallest_normal, info.smallest_normal * info.eps * 3):
        keys, values = make_pair(dtype)
        keys = (keys.double() / keys.abs().max() * size).to(keys.dtype)
        keys[0, 3] = info.max
        values[:, 5] = info.smallest_normal * info.eps
        assert_within_bounds(name, (keys, values))
        assert all(plane.isfinite().all() for plane in through(name, (keys, values)))


@every_dtype
@every_codec
def test_a_token_of_zeros_stays_zero(name: str, dtype: str) -> None:
    keys, values = make_pair(dtype)
    keys[:, 4] = 0
    values[:] = 0
    for now, before in zip(through(name, (keys, values)), (keys, values), strict=True):
        assert torch.equal(now[before == 0], before[before == 0])


@every_codec
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 2), (3, 7, 5), (5, 1, 33)], ids=str)
def test_any_shape(name: str, shape: tuple[int, int, int]) -> None:
    heads, tokens, dim = shape
    pair = make_pair("bfloat16", heads, tokens, dim)
    if name in CASTS:
        assert all(map(torch.equal, through(name, pair), map(rounded(name), pair)))
    elif CODECS[name].lossless:
        assert all(map(torch.equal, through(name, pair), pair))
    else:
        assert_within_bounds(name, pair)


@every_dtype
@every_codec
def test_sizes_stated_are_right(name: str, dtype: str) -> None:
    pair = make_pair(dtype, 3, 11, 6)
    size = codec(name).layer_bytes(spec_of(pair), 11)
    sizes = {codec(name).encode(*pair, layer, LAYERS).size for layer in range(LAYERS)}
    assert size is None or sizes == {size}


@every_codec
def test_names_are_those_of_the_registry(name: str) -> None:
    assert CODECS[name].name == name


@every_dtype
@pytest.mark.parametrize("name", ["raw", *CASTS, *BYTEWISE])
def test_what_was_decoded_encodes_to_the_same_bytes(name: str, dtype: str) -> None:
    pair = make_pair(dtype, tokens=200)
    again = codec(name).encode(*through(name, pair), 0, LAYERS)
    assert np.array_equal(again, codec(name).encode(*pair, 0, LAYERS))


def test_entropy_coding_loses_no_symbol() -> None:
    pair = make_pair(heads=4, tokens=300)
    for layer in (0, 5, 11):
        for now, before, bins in zip(
            through("cachegen", pair, layer), pair, CacheGen().bins(layer), strict=True
        ):
            most = bins // 2 - 1
            peaks = before.abs().amax((0, 2), keepdim=True)
            assert torch.equal((before / peaks * most).round() / most * peaks, now)


@every_codec
def test_memory_layout_does_not_count(name: str) -> None:
    keys, values = make_pair("float16")
    turned = keys.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([values, values], -1)[..., 1]
    assert not turned.is_contiguous() and not wide.is_contiguous()
    encoded = codec(name).encode(keys, values, 3, LAYERS)
    assert np.array_equal(codec(name).encode(turned, wide, 3, LAYERS), encoded)
    assert encoded.dtype == np.uint8 and encoded.ndim == 1


@every_codec
def test_bytes_may_lie_anywhere_in_memory(name: str) -> None:
    pair = make_pair("float32")
    data = codec(name).encode(*pair, 0, LAYERS)
    for shift in range(4):
        moved = np.concatenate([np.zeros(shift, np.uint8), data])[shift:]
        now = codec(name).decode(moved, spec_of(pair), 21, 0)
        assert all(map(torch.equal, now, through(name, pair)))


@every_codec
def test_the_same_bytes_in_every_thread(name: str) -> None:
    pair = make_pair("bfloat16", tokens=60)
    data, now = codec(name).encode(*pair, 0, LAYERS), through(name, pair)

    def agrees(_: int) -> bool:
        same = np.array_equal(codec(name).encode(*pair, 0, LAYERS), data)
        return same and all(map(torch.equal, through(name, pair), now))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(agrees, range(40)))


@lossy
def test_what_no_scale_can_hold_is_refused(name: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        keys, values = make_pair("float16")
        values[1, 2, 3] = bad
        with pytest.raises(ValueError, match="no answer may come from it"):
            codec(name).encode(keys, values, 0, LAYERS)


def damaged(rng: random.Random, data: Bytes) -> Bytes:
    """Other bytes: noise, some bytes changed, the end missing, or more behind it."""
    changed = data.copy()
    kind = rng.randrange(6)
    if kind == 0:
        return np.frombuffer(rng.randbytes(rng.randrange(2 * data.size)), np.uint8).copy()
    if kind == 1:
        changed[8:] = np.frombuffer(rng.randbytes(data.size - 8), np.uint8)
    elif kind == 2:
        return changed[: rng.randrange(data.size)]
    elif kind == 3:
        return np.concatenate([changed, changed[: rng.randrange(1, 99)]])
    else:
        for _ in range(rng.randint(1, 9)):
            changed[rng.randrange(data.size if kind == 4 else 60)] = rng.randrange(256)
    return changed


@every_dtype
@lossy
def test_any_bytes_are_refused_or_numbers_of_this_shape(name: str, dtype: str) -> None:
    rng = random.Random(1)
    pair = make_pair(dtype, tokens=5)
    data, refused = codec(name).encode(*pair, 0, LAYERS), 0
    for _ in range(1000):
        try:
            now = codec(name).decode(damaged(rng, data), spec_of(pair), 5, 0)
        except ConfigError:
            raise
        except ValueError:
            refused += 1
        else:
            assert all(plane.shape == pair[0].shape for plane in now)
            assert all(plane.dtype == pair[0].dtype for plane in now)
            assert all(plane.isfinite().all() for plane in now)
    assert refused > 500


@every_codec
def test_other_shapes_are_refused_before_memory_is_taken(name: str) -> None:
    pair = make_pair("bfloat16")
    data = codec(name).encode(*pair, 0, LAYERS)
    for heads, tokens, dim in ((2, 20, 8), (2, 22, 8), (2**16, 21, 2**20), (2, 2**40, 8)):
        spec = KVSpec(LAYERS, heads, dim, "bfloat16")
        with pytest.raises(ValueError, match="bytes|numbers for shape|words|magnitude"):
            codec(name).decode(data.copy(), spec, tokens, 0)


def test_few_bytes_that_claim_many_numbers_are_refused() -> None:
    spec = KVSpec(LAYERS, 4096, 128, "bfloat16")  # 2^39 numbers: these tables are long enough
    data = np.zeros(8 + 2 * 2**19 * 2 + 2 * 2**19, np.uint8)
    data[:6] = np.frombuffer(b"cgn\x01\x20\x20", np.uint8)
    with pytest.raises(ValueError, match="cannot hold"):
        codec("cachegen").decode(data, spec, 2**19, 0)


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
    data = codec(name).encode(*pair, 0, LAYERS)
    data[place] = byte
    if place > 6 and why == "largest magnitude":
        data[place - 1] |= 0x80  # all ones are NaN, or a number below zero
    with pytest.raises(ValueError, match=why):
        codec(name).decode(data, spec_of(pair), 21, 0)


def test_a_bell_that_is_none_is_refused() -> None:
    pair = make_pair("float32")
    data = codec("cachegen").encode(*pair, 11, LAYERS)  # 16 bins for values: fewer bells
    assert len(bells(15).weights) < 255
    data[8 + 2 * 21 * 4 + 16] = 255
    with pytest.raises(ValueError, match="without a distribution"):
        codec("cachegen").decode(data, spec_of(pair), 21, 11)


def test_cachegen_takes_far_fewer_bytes_than_int8() -> None:
    pair = make_pair("bfloat16", heads=4, tokens=128, dim=32)
    sizes = {name: codec(name).encode(*pair, 11, LAYERS).size for name in CODECS}
    assert sizes["cachegen"] * 2 < sizes["int8"] == sizes["fp8"]


def test_levels_are_in_the_bytes() -> None:
    coarse = CacheGen(value_first_layers=0, value_second_bins=8)
    pair = make_pair()
    data = coarse.encode(*pair, 0, LAYERS)
    assert data.size < codec("cachegen").encode(*pair, 0, LAYERS).size
    _, now = codec("cachegen").decode(data, spec_of(pair), 21, 0)
    assert len(torch.unique((now / pair[1].abs().amax((0, 2), keepdim=True) * 3).round())) == 7
    with pytest.raises(ValueError, match="7 bins"):
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
        data = codec(name).encode(keys, -keys, 2, LAYERS)
        assert data.tobytes().hex() == written
        again = codec(name).decode(data.copy(), spec, 3, 2)
        assert all(map(torch.equal, again, through(name, (keys, -keys), 2)))


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
    data = codec("cachegen").encode(*pair, 0, LAYERS)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[codecs\]'"):
        codec("cachegen").encode(*pair, 0, LAYERS)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[codecs\]'"):
        codec("cachegen").decode(data, spec_of(pair), 21, 0)
