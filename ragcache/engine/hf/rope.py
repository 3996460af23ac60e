"""Undo and apply a model's rotary position embedding (RoPE) with the model's own function."""

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

__all__ = ["Rope"]

RotaryFunction = Callable[..., tuple[Tensor, Tensor]]

_NAME, _TAKES = "apply_rotary_pos_emb", ["q", "k", "cos", "sin"]
_RECORDING = threading.Lock()  # two recordings must not restore each other's function


@dataclass(frozen=True, slots=True)
class RotaryCall:
    """One call of a model's rotary function by one of its layers."""

    keys: Tensor  # (batch, kv_heads, n, head_dim, or only the dimensions that are rotated)
    cos: Tensor  # (batch, n, rotary_dim)
    sin: Tensor  # same shape
    rotated: Tensor  # the keys that it returned, same shape as ``keys``


@dataclass(frozen=True)
class Rope:
    """RoPE (Su et al., arXiv:2104.09864) as one architecture applies it.

    Architectures pair dimensions in halves or interleaved, and rotate whole heads or a part.
    ``cos`` and ``sin`` are those that the model passes to its layers, (batch, n, rotary_dim). A
    scaling factor f on them (YaRN's attention factor, cos^2 + sin^2 = f^2) is applied by
    ``rotate`` and removed by ``unrotate``. Both compute in float32.
    """

    apply: RotaryFunction
    width: int | None = None  # leading head dimensions that ``apply`` takes; None: all
    halves: bool = False  # dimensions i and i + rotary_dim / 2 are a pair, as in Llama

    @classmethod
    def of(cls, layer: nn.Module) -> Rope:
        """RoPE with the rotary function of the module that defines ``layer``.

        Raises ModelError if that module has none with the usual signature.
        """
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
    def from_call(cls, apply: RotaryFunction, call: RotaryCall, head_dim: int) -> Rope:
        """RoPE as a layer with heads of ``head_dim`` dimensions applied it in ``call``.

        A layer with partial RoPE passes either the rotated dimensions or whole heads.
        """
        width = call.keys.shape[-1]
        halves = _rotates_halves(apply, width, call.cos.shape[-1])
        return cls(apply, None if width == head_dim else width, halves)

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate keys (batch, heads, n, head_dim) to the positions of ``cos`` and ``sin``."""
        return self._applied(keys.float(), cos.float(), sin.float())

    def rotate_into(self, keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """:meth:`rotate` keys (heads, n, head_dim) by cos and sin (n, rotary_dim) into ``out``, of
        any dtype, in fewer passes. ``out`` may be ``keys``."""
        if self.halves:
            _rotate_halves(keys, cos.float(), sin.float(), out)
        else:
            out.copy_(self.rotate(keys[None], cos[None], sin[None])[0])

    def unrotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`, same shapes: a rotation by (cos, -sin) / f^2."""
        cos, sin = cos.float(), sin.float()
        norm = cos.square() + sin.square()
        return self._applied(keys.float(), cos / norm, -sin / norm)

    def _applied(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.width is None:  # queries of no heads cost nothing
            return self.apply(keys[:, :0], keys, cos, sin)[1]
        head, tail = keys[..., : self.width], keys[..., self.width :]
        return torch.cat([self.apply(head[:, :0], head, cos, sin)[1], tail], dim=-1)


@contextmanager
def record_rotary_calls(layer: nn.Module) -> Iterator[list[RotaryCall]]:
    """Record the calls of the rotary function of ``layer``'s module by this thread.

    The function is replaced while the context lasts, one context at a time.
    """
    module, thread, calls = _defining(layer), threading.get_ident(), list[RotaryCall]()
    with _RECORDING:
        original = getattr(module, _NAME)
        signature = inspect.signature(original)

        @wraps(original)
        def recording(*args: Any, **kwargs: Any) -> Any:
            rotated = original(*args, **kwargs)
            if threading.get_ident() == thread:
                given = signature.bind(*args, **kwargs).arguments
                calls.append(RotaryCall(given["k"], given["cos"], given["sin"], rotated[1]))
            return rotated

        setattr(module, _NAME, recording)
        try:
            yield calls
        finally:
            setattr(module, _NAME, original)


def _defining(layer: nn.Module) -> ModuleType:
    return sys.modules[type(layer).__module__]


def _rotates_halves(apply: RotaryFunction, dim: int, rotary: int) -> bool:
    """Whether ``apply`` computes what :func:`_rotate_halves` does, for keys of ``dim`` dimensions.

    Both are polynomials of degree two in keys, cos and sin. Two different ones agree at a random
    point of 129 values per variable with a probability of at most 2/129 (Schwartz-Zippel). They are
    compared at 16 points per dimension, small integers on which float32 is exact.
    """
    if rotary % 2 or rotary > dim:
        return False
    generator = torch.Generator().manual_seed(0)
    keys, cos, sin = (
        torch.randint(-64, 65, shape, generator=generator).float()
        for shape in ((1, 4, 4, dim), (1, 4, rotary), (1, 4, rotary))
    )
    want, got = apply(keys[:, :0], keys, cos, sin)[1], torch.empty_like(keys)
    _rotate_halves(keys, cos[0], sin[0], got)
    return torch.equal(got, want)


def _rotate_halves(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate (a, b) to (a cos - b sin, b cos + a sin): the halves of the first rotary_dim.

    cos and sin are (n, rotary_dim), float32. Computes in float32. ``out`` may be ``keys``.
    """
    width, half = cos.shape[-1], cos.shape[-1] // 2
    whole = keys[..., :width].float()
    swapped = whole.roll(half, dims=-1)
    into = out[..., :width] if out.dtype == torch.float32 else torch.empty_like(whole)
    torch.mul(whole, cos, out=into)
    into[..., :half].addcmul_(swapped[..., :half], sin[..., :half], value=-1)
    into[..., half:].addcmul_(swapped[..., half:], sin[..., half:])
    if out.dtype != torch.float32:
        out[..., :width] = into
    if width < keys.shape[-1] and out is not keys:
        out[..., width:] = keys[..., width:]
