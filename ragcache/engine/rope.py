"""Undo and redo a model's rotary position embedding with the model's own function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ragcache.errors import ModelError

Apply = Callable[..., tuple[Tensor, Tensor]]
Turn = Callable[[Tensor, slice, Tensor], None]  # keys, their rows, where to write them


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
        module = sys.modules[type(layer).__module__]
        apply = getattr(module, "apply_rotary_pos_emb", None)
        if apply is None:
            raise ModelError(
                f"{type(layer).__name__} has no rotary position embedding that ragcache knows "
                f"(no apply_rotary_pos_emb in {module.__name__}). Use a RoPE decoder such as "
                "Llama, Qwen, Mistral, Gemma or Phi."
            )
        return cls(apply)

    def fitted(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Rope:
        """What an architecture does, found out by trying it on these keys.

        For partial RoPE, some slice inside their function and some before it. Where keys turn in
        halves, which is usual, ``turning`` makes use of it.
        """
        rope = self
        try:
            want = rope.rotate(keys, cos, sin)
        except RuntimeError:
            rope = replace(self, width=cos.shape[-1])
            want = rope.rotate(keys, cos, sin)
        if cos.shape[-1] % 2:
            return rope
        turned = torch.empty_like(want)
        _turn_halves(keys, cos[0].float(), _signed(sin[0].float()), turned)
        return replace(rope, halves=torch.allclose(turned, want, rtol=1e-5, atol=1e-5))

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
