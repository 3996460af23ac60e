"""Muon: momentum whose matrices are orthogonalised before the step (Jordan et al., 2024)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalise(gradient: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on (..., rows, columns): singular values go to about one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = gradient.size(-2) > gradient.size(-1)
    x = (gradient.mT if tall else gradient).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    turned: Tensor = x.mT if tall else x
    return turned.float()


class Muon:
    """Steps matrices of one shape together. The step's RMS matches AdamW's at the same rate.

    ``dtype``: of the iteration.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        momentum: float = 0.95,
        decay: float = 0.01,
    ) -> None:
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(weight.shape), []).append(weight)
        self.momenta = {
            k: torch.zeros(len(v), *k, device=v[0].device) for k, v in self.groups.items()
        }
        self.dtype, self.momentum, self.decay = dtype, momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, weights in self.groups.items():
            gradient = torch.stack([w.grad for w in weights if w.grad is not None])
            momentum = self.momenta[shape]
            momentum.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(momentum, self.momentum), self.dtype)
            update *= 0.2 * math.sqrt(max(shape))
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - rate * self.decay).add_(change, alpha=-rate)
                weight.grad = None
