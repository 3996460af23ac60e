"""Undo and redo a model's rotary position embedding with the model's own function."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ragcache.errors import ModelError

Apply = Callable[..., tuple[Tensor, Tensor]]
Turn = Callable[[Tensor, slice, Tensor], None]  # keys, their rows, where to write them

_NAME, _TAKES = "apply_rotary_pos_emb", ["q", "k", "cos", "sin"]
_WATCHING = threading.Lock()  # one at a time puts the function back that it found


@dataclass(frozen=True, slots=True)
class Rotation:
    """One call of a model's rotary function, by one of its layers."""

    keys: Tensor  # (batch, kv_heads, n, as many head dimensions as the layer lets turn)
    cos: Tensor  # (batch, n, rotary_dim)
    sin: Tensor  # same shape
    turned: Tensor  # the keys that it gave back


@dataclass(frozen=True)
class Rope:
    """RoPE as one architecture applies it: half or interleaved pairs, whole or partial heads.

    ``cos`` and ``sin`` are those the model hands its layers, (batch, n, rotary_dim). A scaling
    factor on them (YaRN's attention factor f, cos^2 + sin^2 = f^2) is taken out by ``unrotate``
    and put in once by ``rotate``. Everything in float32.
    """

    apply: Apply
    width: int | None = None  # leading head dimensions that ``apply`` takes; None: all
    halves: bool = False  # dimension i is known to turn with i + rotary_dim / 2, as in Llama

    @classmethod
    def of(cls, layer: nn.Module) -> Rope:
        """Find the rotary function of the module that defines ``layer``."""
        module = _defining(layer)
        apply = getattr(module, _NAME, None)
        if apply is None or list(inspect.signature(apply).parameters)[:4] != _TAKES:
            raise ModelError(
                f"{type(layer).__name__} has no rotary position embedding that ragcache knows (no "
                f"{_NAME}({', '.join(_TAKES)}) in {module.__name__}). Use a RoPE decoder such as "
                "Llama, Qwen, Mistral, Gemma or Phi."
            )
        return cls(apply)

    @classmethod
    def seen(cls, apply: Apply, call: Rotation, head_dim: int) -> Rope:
        """What a layer with heads of ``head_dim`` was seen to do with its keys.

        A layer with partial RoPE may give its function the part that turns, or whole heads.
        """
        given = call.keys.shape[-1]
        halves = _turns_halves(apply, given, call.cos.shape[-1])
        return cls(apply, None if given == head_dim else given, halves)

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (batch, heads, n, head_dim) moved to the positions of ``cos`` and ``sin``."""
        return self._applied(keys.float(), cos.float(), sin.float())

    def turning(self, cos: Tensor, sin: Tensor) -> Turn:
        """What :meth:`rotate` does with any rows of these (rows, rotary_dim), in few passes.

        It takes keys (heads, n, head_dim), the rows they belong to, and where to write them, in
        any dtype.
        """
        if self.halves:
            cos, sin = cos.float(), _signed(sin.float())
            return lambda keys, rows, out: _turn_halves(keys, cos[rows], sin[rows], out)

        def turn(keys: Tensor, rows: slice, out: Tensor) -> None:
            out.copy_(self.rotate(keys[None], cos[None, rows], sin[None, rows])[0])

        return turn

    def unrotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`: the inverse rotation is (cos, -sin) / f^2."""
        cos, sin = cos.float(), sin.float()
        norm = cos.square() + sin.square()
        return self._applied(keys.float(), cos / norm, -sin / norm)

    def _applied(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.width is None:  # no queries: their half of the work is left out
            return self.apply(keys[:, :0], keys, cos, sin)[1]
        head, tail = keys[..., : self.width], keys[..., self.width :]
        return torch.cat([self.apply(head[:, :0], head, cos, sin)[1], tail], dim=-1)


@contextmanager
def rotations(layer: nn.Module) -> Iterator[list[Rotation]]:
    """Every call of the rotary function of ``layer``'s module by this thread, while this lasts."""
    module, thread, calls = _defining(layer), threading.get_ident(), list[Rotation]()
    with _WATCHING:
        own = getattr(module, _NAME)
        takes = inspect.signature(own)

        @wraps(own)
        def watched(*args: Any, **kwargs: Any) -> Any:
            turned = own(*args, **kwargs)
            if threading.get_ident() == thread:
                given = takes.bind(*args, **kwargs).arguments
                calls.append(Rotation(given["k"], given["cos"], given["sin"], turned[1]))
            return turned

        setattr(module, _NAME, watched)
        try:
            yield calls
        finally:
            setattr(module, _NAME, own)


def _defining(layer: nn.Module) -> ModuleType:
    return sys.modules[type(layer).__module__]


def _turns_halves(apply: Apply, dim: int, rotary: int) -> bool:
    """Whether ``apply`` is the very function that ``_turn_halves`` is, for keys of ``dim``.

    Both are polynomials of degree two in keys, cos and sin, and two of those that differ agree at
    random points of 129 values with a probability of at most 2/129. They are compared at 16 points
    for every dimension, small integers, on which float32 is exact: so nothing but equality counts.
    """
    if rotary % 2 or rotary > dim:
        return False
    generator = torch.Generator().manual_seed(0)
    keys, cos, sin = (
        torch.randint(-64, 65, shape, generator=generator).float()
        for shape in ((1, 4, 4, dim), (1, 4, rotary), (1, 4, rotary))
    )
    want, got = apply(keys[:, :0], keys, cos, sin)[1], torch.empty_like(keys)
    _turn_halves(keys, cos[0], _signed(sin[0]), got)
    return torch.equal(got, want)


def _signed(sin: Tensor) -> Tensor:
    """``sin`` for the keys with their halves exchanged: the first half is taken off."""
    low, high = sin.chunk(2, dim=-1)
    return torch.cat([-low, high], dim=-1)


def _turn_halves(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the first rotary_dim.

    cos and :func:`_signed` sin are (n, rotary_dim), float32, as what is computed.
    """
    width = cos.shape[-1]
    straight = keys[..., :width].float()
    crossed = straight.roll(width // 2, dims=-1).mul_(sin)
    if out.dtype == torch.float32:
        torch.addcmul(crossed, straight, cos, out=out[..., :width])
    else:
        out[..., :width] = crossed.addcmul_(straight, cos)
    if width < keys.shape[-1]:
        out[..., width:] = keys[..., width:]
