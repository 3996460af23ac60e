"""Transform coding over several layers: an eighth to a twentieth of bfloat16's bytes."""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ragcache.store.format.codecs.base import DTYPES, Bytes, Codec, from_bytes, to_bytes
from ragcache.store.format.codecs.basis import Basis
from ragcache.store.format.codecs.entropy import constriction_stream
from ragcache.types import KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

__all__ = ["LEVELS"]

#: Names, and how many times fewer bytes than bfloat16 they take, about.
LEVELS = {"kvtc8": 8, "kvtc12": 12, "kvtc16": 16, "kvtc20": 20}

#: A number of magnitude z becomes the level floor(|z| / step + ROUND_UP): less than half is added,
#: since small levels are likelier than large ones (a dead zone, as video codecs have it).
ROUND_UP = 0.4

#: In which products are computed when KV is decoded. bfloat16's error of 0.3 % is small beside
#: that of quantisation, and on CPUs that multiply it, it is four times faster.
_PRODUCTS = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

_TAG = b"kvt\x01"
_HEAD = struct.Struct("<4sI")  # tag, rows that are stored as they are
#: A row is stored as it is if its error is so many times that of the text of the basis.
_MOST_ERROR = 8.0
_MOST_PER_NUMBER = 3  # bytes: no distribution spends more than 24 bits on a symbol
_RECENT_BYTES = 128 << 20  # of levels of groups whose other layers will be asked for


@dataclass(frozen=True, eq=False)
class KVTC(Codec):
    """KV transform coding (Staniszewski and Łańcucki, 2025, arXiv:2511.01815), over layers.

    The keys (before RoPE) and values of a few consecutive layers of a token are one row. Every
    plane of it is weighted by what its errors do to the model's predictions, and the row is
    transformed to the principal components of the ``basis``. These are quantised by one step for
    all, so that those with little variance vanish and errors are spread evenly, which is the
    allocation of bits that theory asks for (reverse water-filling), and coded by an entropy coder,
    each with the distribution of its own spread. Differences to the paper: groups of layers instead
    of all, so that loading can stay a few layers ahead; weights; and bits are allocated by the step
    and entropy coding, not by dynamic programming over fixed widths.

    Rows that the basis does not describe, whose error is more than eight times the usual or whose
    levels are beyond the alphabet, are stored as they are.

    Bytes of the first layer of a group, little-endian: tag, count of rows stored as they are; their
    numbers, u32; their KV in KV's dtype, (2, layers of the group, kv_heads, rows, head_dim);
    32-bit words of constriction's ANS coder, which gives the components in order, token by token.
    The other layers of the group have no bytes.
    """

    basis: Basis
    level: int  # of :data:`LEVELS`

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"kvtc{self.level}:{self.basis.digest}"

    @cached_property
    def _codings(self) -> list[_Coding]:
        """Of every group."""
        return [_Coding(self.basis, number, self.level) for number in range(len(self.basis.groups))]

    def check(self) -> None:
        constriction_stream()

    def payload_of(self, layer: int) -> int:
        return layer - layer % self.basis.together

    def encode_layers(self, pairs: Sequence[KVPair]) -> Iterator[Bytes]:
        shape = self.basis.layers, self.basis.kv_heads, self.basis.head_dim
        own = len(pairs), pairs[0][0].shape[0], pairs[0][0].shape[2]
        if own != shape:
            raise ValueError(f"the basis of {self.name} is for KV of another shape: {shape}")
        for number, coding in enumerate(self._codings):
            layers = self.basis.layers_of(number)
            yield self._encode(coding, layers, [pairs[layer] for layer in layers])
            yield from (np.empty(0, np.uint8) for _ in layers[1:])

    def _encode(self, coding: _Coding, layers: range, pairs: Sequence[KVPair]) -> Bytes:
        planes = torch.stack([plane.detach().cpu() for pair in pairs for plane in pair])
        if not torch.isfinite(planes).all():
            raise ValueError("the KV holds NaN or infinities: no answer may come from it")
        rows = self.basis.rows(planes, layers) - coding.group.mean
        numbers = rows @ coding.components.T
        levels = quantise(numbers, coding.step)
        error = (rows - coding.restored(levels) @ coding.components).square().sum(1)
        kept = (error > _MOST_ERROR * coding.error) | (levels.abs() > coding.most).any(1)
        kept |= ~torch.isfinite(error)
        levels[kept] = 0
        symbols = (levels + coding.most).T.to(torch.int32).contiguous().numpy()
        coder = constriction_stream().stack.AnsCoder()
        for part, model in reversed(coding.runs):
            coder.encode_reverse(symbols[part].reshape(-1), model)
        words = coder.get_compressed().astype("<u4", copy=False).view(np.uint8)
        which = kept.nonzero()[:, 0]
        parts = [
            np.frombuffer(_HEAD.pack(_TAG, len(which)), np.uint8),
            which.numpy().astype("<u4").view(np.uint8),
        ]
        if len(which):
            parts.append(to_bytes(planes[:, :, which]))
        return np.concatenate([*parts, words])

    def decode(self, data: Bytes, spec: KVSpec, tokens: int, layer: int) -> KVPair:
        number = layer // self.basis.together
        layers, coding = self.basis.layers_of(number), self._codings[number]
        heads, dim = self.basis.kv_heads, self.basis.head_dim
        if (spec.layers, spec.kv_heads, spec.head_dim) != (self.basis.layers, heads, dim):
            raise ValueError(f"the basis of {self.name} is for KV of another shape")
        kept, planes, words = self._split(data, spec, tokens, layers)
        # The other layers of the group will be asked for next.
        key = self.name, number, tokens, xxh3_128_digest(words.data)
        numbers = RECENT.get(key, lambda: coding.restored(coding.read(words, tokens)).to(_PRODUCTS))
        both = coding.layer(numbers, layer - layers.start).view(tokens, 2, heads, dim)
        both = both.permute(1, 2, 0, 3)
        made = both.to(DTYPES[spec.dtype][0])
        if planes is not None:
            at = 2 * (layer - layers.start)
            made[:, :, kept] = planes[at : at + 2]
        # Written so that NaN is refused, too.
        if not coding.bound <= torch.finfo(made.dtype).max and not bool(made.isfinite().all()):
            raise ValueError("a number that is NaN or infinite")
        made = made.contiguous()
        return made[0], made[1]

    def _split(
        self, data: Bytes, spec: KVSpec, tokens: int, layers: range
    ) -> tuple[Tensor, Tensor | None, Bytes]:
        """Rows stored as they are, their planes, and the words. Raises ValueError."""
        if data.size < _HEAD.size:
            raise ValueError(f"{data.size} bytes")
        tag, count = _HEAD.unpack(data[: _HEAD.size].tobytes())
        if tag != _TAG or count > tokens:
            raise ValueError(f"the bytes do not begin with {_TAG!r} and a count of rows")
        first = _HEAD.size + 4 * count
        shape = 2 * len(layers), spec.kv_heads, count, spec.head_dim
        end = first + 2 * len(layers) * spec.kv_heads * spec.head_dim * count * spec.itemsize
        if data.size < end or (data.size - end) % 4:
            raise ValueError(f"{data.size} bytes, not {end} and some words")
        which = torch.from_numpy(data[_HEAD.size : first].view("<u4").astype(np.int64))
        rising = bool((which.diff() > 0).all()) and (not count or int(which[-1]) < tokens)
        if not rising:
            raise ValueError("rows that do not rise")
        words = data[end:]
        if not count:
            return which, None, words
        planes = from_bytes(data[first:end].copy(), spec.dtype, shape)
        if not bool(torch.isfinite(planes).all()):
            raise ValueError("a row that holds NaN or infinities")
        return which, planes, words

    def most_bytes(self, spec: KVSpec, tokens: int) -> int:
        """The size with every row stored as it is, and every symbol the most expensive one."""
        numbers = 2 * self.basis.together * spec.kv_heads * spec.head_dim * tokens
        return _HEAD.size + 4 * tokens + numbers * (spec.itemsize + _MOST_PER_NUMBER) + 16


def quantise(numbers: Tensor, step: float) -> Tensor:
    """Levels of numbers, same shape: how many steps each is."""
    return (numbers.abs() / step + ROUND_UP).floor().mul_(numbers.sign())


class _Coding:
    """How one group of layers is coded at one level."""

    def __init__(self, basis: Basis, number: int, level: int) -> None:
        self.group, self.step = basis.groups[number], basis.steps[level]
        group, spreads = self.group, self.group.spreads[level]
        self.components = group.components[: len(spreads)]  # those that are kept, (kept, G)
        layers = basis.layers_of(number)
        weights = basis.weights[layers.start : layers.stop]
        width = basis.kv_heads * basis.head_dim
        scales = (1 / weights).reshape(-1, 1).expand(-1, width).reshape(len(weights), 2 * width)
        columns = self.components.T.reshape(len(weights), 2 * width, -1) * scales[..., None]
        # Of each layer, (layers, kept, 2 * kv_heads * head_dim).
        self._columns = columns.transpose(1, 2).contiguous().to(_PRODUCTS)
        self._means = group.mean.reshape(len(weights), 2 * width) * scales
        self.error = group.errors[level]
        tables = [one[one > 0] for one in basis.tables]
        most = torch.tensor([len(one) // 2 for one in tables])
        self.most = most[spreads.long()].float()  # the largest level of each component, (kept,)
        self.runs: list[tuple[slice, Any]] = []  # components with one distribution, and its model
        at = 0
        for kind, run in groupby(spreads.tolist()):
            count = len(list(run))
            self.runs.append((slice(at, at + count), _model(tables[kind])))
            at += count
        # How far the mean of a level's numbers is from its lower end, in steps.
        ratio = (self.step / group.scales[: len(spreads)]).clamp(1e-3, 50)
        self._shift = 1 / ratio - 1 / torch.expm1(ratio)
        reach = self.restored(self.most) @ self._columns.float().abs()
        #: No number that any levels are decoded to is larger.
        self.bound = 1.01 * float((reach + self._means.abs()).max())

    def layer(self, numbers: Tensor, place: int) -> Tensor:
        """Keys and values of a layer of the group, (tokens, 2 * kv_heads * head_dim)."""
        return (numbers @ self._columns[place]).float().add_(self._means[place])

    def restored(self, levels: Tensor) -> Tensor:
        """Numbers of levels, (tokens, kept), float32: the mean of an exponential in each cell."""
        sizes = (levels.abs() - ROUND_UP + self._shift) * self.step
        return sizes.mul_(levels.sign())

    def read(self, words: Bytes, tokens: int) -> Tensor:
        """Levels, (tokens, kept), float32. Raises ValueError for words left over."""
        coder = constriction_stream().stack.AnsCoder(words.view("<u4").astype(np.uint32))
        symbols: NDArray[np.int32] = np.empty((len(self.most), tokens), np.int32)
        for part, model in self.runs:
            count = part.stop - part.start
            symbols[part] = coder.decode(model, count * tokens).reshape(count, tokens)
        if not coder.is_empty():
            raise ValueError("words left over")
        return torch.from_numpy(symbols).T.float() - self.most


def _model(weights: Tensor) -> Any:
    categorical = constriction_stream().model.Categorical
    return categorical(weights.numpy(), perfect=False, lazy=False)


class _Recent:
    """Remembers what was decoded last, up to a number of bytes. Thread-safe: what two threads ask
    for at once is decoded once."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._known: OrderedDict[Any, Future[Tensor]] = OrderedDict()

    def get(self, key: Any, decode: Any) -> Tensor:
        with self._lock:
            found = self._known.get(key)
            mine = found is None
            if found is None:
                found = self._known[key] = Future()
            self._known.move_to_end(key)
        if mine:
            try:
                found.set_result(decode())
            except BaseException as error:
                found.set_exception(error)
                with self._lock:
                    self._known.pop(key, None)
            self._forget()
        return found.result()

    def clear(self) -> None:
        with self._lock:
            self._known.clear()

    def _forget(self) -> None:
        with self._lock:
            sizes = {k: _size(f) for k, f in self._known.items()}
            total = sum(sizes.values())
            for key, size in sizes.items():
                if total <= self._most:
                    break
                if size:
                    del self._known[key]
                    total -= size


def _size(found: Future[Tensor]) -> int:
    done = found.done() and found.exception() is None
    return found.result().nbytes if done else 0


RECENT = _Recent(_RECENT_BYTES)
