"""Undo and redo a model's rotary position embedding with the model's own function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ragcache.errors import ModelError

Apply = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rope:
    """RoPE as one architecture applies it: half or interleaved pairs, whole or partial heads.

    ``cos`` and ``sin`` are those the model hands its layers, (batch, n, rotary_dim). A scaling
    factor on them (YaRN's attention factor f, cos^2 + sin^2 = f^2) is taken out by ``unrotate``
    and put in once by ``rotate``. Everything in float32.
    """

    apply: Apply
    width: int | None = None  # leading head dimensions that ``apply`` takes; None: all

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
        """For partial RoPE: some architectures slice inside their function, some before it."""
        try:
            self.rotate(keys, cos, sin)
        except RuntimeError:
            return Rope(self.apply, cos.shape[-1])
        return self

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (batch, heads, n, head_dim) moved to the positions of ``cos`` and ``sin``."""
        return self._applied(keys.float(), cos.float(), sin.float())

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
