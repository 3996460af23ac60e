"""Tests of the contract of a codec: error bounds, sizes, and refused input."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ragcache.errors import ConfigError
from ragcache.store.format.codecs.base import DTYPES, Bytes, LayerCodec
from ragcache.types import KVSpec

__all__ = ["CodecTests"]

Pair = tuple[Tensor, Tensor]  # keys and values, each (kv_heads, tokens, head_dim)
Part = Literal["keys", "values"]

LAYERS = 12  # layers of the model
PLACES = (0, 1, 2, 9, 10, 11)  # tested layers: a codec may treat the first ones differently

_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_pair(
    dtype: str = "float32", heads: int = 2, tokens: int = 21, dim: int = 8, seed: int = 0
) -> Pair:
    """Random keys and values, each channel with its own mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    centres, spreads = torch.randn(2, 2, heads, 1, dim, generator=generator)
    noise = torch.randn(2, heads, tokens, dim, generator=generator)
    keys, values = (centres + spreads * noise).to(DTYPES[dtype][0])
    return keys, values


def spec_of(pair: Pair) -> KVSpec:
    """The KVSpec of a model of 12 layers to which ``pair`` belongs."""
    heads, _, dim = pair[0].shape
    return KVSpec(LAYERS, heads, dim, str(pair[0].dtype).removeprefix("torch."))


def through(codec: LayerCodec, pair: Pair, layer: int = 0) -> Pair:
    """``pair`` after it was encoded and decoded."""
    data = codec.encode(*pair, layer, LAYERS)
    return codec.decode(data.copy(), spec_of(pair), pair[0].shape[1], layer)


def rounding(dtype: torch.dtype, numbers: Tensor) -> Tensor:
    """The largest error of rounding each of ``numbers`` to ``dtype``, same shape, float64."""
    info = torch.finfo(dtype)
    return numbers.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


class CodecTests:
    """Tests of a :class:`~ragcache.store.format.codecs.base.LayerCodec`.

    A subclass sets ``codec``, and overrides :meth:`bound` if the codec is lossy.
    """

    codec: ClassVar[LayerCodec]
    #: Whether decoded KV encodes to the same bytes again.
    repeats: ClassVar[bool] = True

    def bound(self, numbers: Tensor, part: Part, layer: int) -> Tensor:
        """The largest allowed error of each of ``numbers``, before it is rounded to its dtype.

        ``numbers`` (kv_heads, tokens, head_dim) are a layer's keys or values in float64; the
        result has a shape that broadcasts to theirs.
        """
        assert self.codec.lossless, "override bound: by how much may a number be off?"
        return torch.zeros_like(numbers)

    def assert_within_bounds(self, pair: Pair, layer: int = 0) -> None:
        """Raise AssertionError unless every number of ``pair`` comes back within its bound."""
        parts: tuple[Part, Part] = "keys", "values"
        for now, before, part in zip(through(self.codec, pair, layer), pair, parts, strict=True):
            assert now.dtype == before.dtype and now.shape == before.shape
            if self.codec.lossless:
                assert torch.equal(now, before)
                continue
            wide = before.double()
            allowed = self.bound(wide, part, layer) * (1 + 1e-5)
            allowed = allowed + rounding(before.dtype, wide * 1.1)
            # up to three roundings in float32, of which the last may be to a subnormal
            allowed = allowed + 4 * rounding(torch.float32, wide.abs().amax())
            assert ((now.double() - wide).abs() <= allowed).all()

    @_every_dtype
    def test_no_number_is_off_by_more_than_stated(self, dtype: str) -> None:
        for layer in PLACES:
            self.assert_within_bounds(make_pair(dtype, seed=layer), layer)

    @_every_dtype
    def test_extreme_numbers_keep_the_bounds_or_are_refused(self, dtype: str) -> None:
        info = torch.finfo(DTYPES[dtype][0])
        for size in (info.max, info.smallest_normal, info.smallest_normal * info.eps * 3):
            keys, values = make_pair(dtype)
            keys = (keys.double() / keys.abs().max() * size).to(keys.dtype)
            keys[0, 3] = info.max
            values[:, 5] = info.smallest_normal * info.eps
            try:
                self.codec.encode(keys, values, 0, LAYERS)
            except ValueError:
                continue
            self.assert_within_bounds((keys, values))

    @_every_dtype
    def test_a_token_of_zeros_stays_zero(self, dtype: str) -> None:
        keys, values = make_pair(dtype)
        keys[:, 4] = 0
        values[:] = 0
        pair = keys, values
        for now, before in zip(through(self.codec, pair), pair, strict=True):
            assert torch.equal(now[before == 0], before[before == 0])

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 2), (3, 7, 5), (5, 1, 33)], ids=str)
    def test_any_shape(self, shape: tuple[int, int, int]) -> None:
        self.assert_within_bounds(make_pair("bfloat16", *shape))

    @_every_dtype
    def test_stated_sizes_are_right(self, dtype: str) -> None:
        pair = make_pair(dtype, 3, 11, 6)
        sizes = {self.codec.encode(*pair, layer, LAYERS).size for layer in range(LAYERS)}
        stated = self.codec.layer_bytes(spec_of(pair), 11)
        assert stated is None or sizes == {stated}
        assert max(sizes) <= self.codec.most_bytes(spec_of(pair), 11)

    @_every_dtype
    def test_what_was_decoded_encodes_to_the_same_bytes(self, dtype: str) -> None:
        if not self.repeats:
            pytest.skip("this codec does not promise it")
        pair = make_pair(dtype, tokens=200)
        again = self.codec.encode(*through(self.codec, pair), 0, LAYERS)
        assert np.array_equal(again, self.codec.encode(*pair, 0, LAYERS))

    def test_memory_layout_does_not_matter(self) -> None:
        keys, values = make_pair("float16")
        turned = keys.transpose(0, 1).contiguous().transpose(0, 1)
        wide = torch.stack([values, values], -1)[..., 1]
        assert not turned.is_contiguous() and not wide.is_contiguous()
        encoded = self.codec.encode(keys, values, 3, LAYERS)
        assert np.array_equal(self.codec.encode(turned, wide, 3, LAYERS), encoded)
        assert encoded.dtype == np.uint8 and encoded.ndim == 1

    def test_bytes_may_lie_anywhere_in_memory(self) -> None:
        pair = make_pair("float32")
        data = self.codec.encode(*pair, 0, LAYERS)
        for shift in range(4):
            moved = np.concatenate([np.zeros(shift, np.uint8), data])[shift:]
            now = self.codec.decode(moved, spec_of(pair), 21, 0)
            assert all(map(torch.equal, now, through(self.codec, pair)))

    def test_the_same_bytes_in_every_thread(self) -> None:
        pair = make_pair("bfloat16", tokens=60)
        data, now = self.codec.encode(*pair, 0, LAYERS), through(self.codec, pair)

        def agrees(_: int) -> bool:
            same = np.array_equal(self.codec.encode(*pair, 0, LAYERS), data)
            return same and all(map(torch.equal, through(self.codec, pair), now))

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(agrees, range(40)))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_never_comes_back(self, bad: float) -> None:
        keys, values = make_pair("float16")
        values[1, 2, 3] = bad
        with pytest.raises(ValueError):
            through(self.codec, (keys, values))

    @_every_dtype
    def test_any_bytes_are_refused_or_numbers_of_this_shape(self, dtype: str) -> None:
        rng = random.Random(1)
        pair = make_pair(dtype, tokens=5)
        data, refused = self.codec.encode(*pair, 0, LAYERS), 0
        for _ in range(1000):
            try:
                now = self.codec.decode(_damaged(rng, data), spec_of(pair), 5, 0)
            except ConfigError:  # also a ValueError, but it means that a package is not installed
                raise
            except ValueError:
                refused += 1
            else:
                assert all(plane.shape == pair[0].shape for plane in now)
                assert all(plane.dtype == pair[0].dtype for plane in now)
                assert all(plane.isfinite().all() for plane in now)
        assert refused > 400  # nearly half of them have another length

    def test_bytes_of_another_length_are_refused(self) -> None:
        pair = make_pair("bfloat16")
        data = self.codec.encode(*pair, 0, LAYERS)
        if self.codec.layer_bytes(spec_of(pair), 21) is None:
            pytest.skip("this codec's layers have lengths of their own")
        for wrong in (data[:0], data[:-1], data[: data.size // 2], np.concatenate([data, data])):
            with pytest.raises(ValueError):
                self.codec.decode(wrong.copy(), spec_of(pair), 21, 0)

    def test_other_shapes_are_refused_before_memory_is_taken(self) -> None:
        pair = make_pair("bfloat16")
        data = self.codec.encode(*pair, 0, LAYERS)
        for heads, tokens, dim in ((2, 20, 8), (2, 22, 8), (2**16, 21, 2**20), (2, 2**40, 8)):
            spec = KVSpec(LAYERS, heads, dim, "bfloat16")
            with pytest.raises(ValueError):
                self.codec.decode(data.copy(), spec, tokens, 0)


def _damaged(rng: random.Random, data: Bytes) -> Bytes:
    """Damaged bytes: noise, some bytes changed, truncated, or with bytes added."""
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
