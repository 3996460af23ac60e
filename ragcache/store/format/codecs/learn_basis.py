"""Learn a basis from the KV of some text: see :mod:`ragcache.store.format.codecs.basis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2
from typing import TYPE_CHECKING, NamedTuple

import torch

from ragcache.store.format.codecs.basis import Basis, GroupBasis
from ragcache.store.format.codecs.entropy import TOTAL
from ragcache.store.format.codecs.kvtc import LEVELS, ROUND_UP, quantise

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import ChunkKV

__all__ = ["learn_basis"]

_WIDTH = 2048  # numbers of a row, about: more decode more slowly than they save bytes
_LAYERS = 2, 6  # the least and the most in a group, whatever their width
_BFLOAT16 = 16  # bits
#: Text that is unlike the held-out one takes more: HotpotQA's paragraphs a quarter more than the
#: shipped articles, with SmolLM2-135M.
_RESERVE = 0.8

#: Distributions: scales in steps, four in each octave.
_SPREADS = tuple(2 ** (n / 4) for n in range(-8, 29))
_REACH = 20  # scales within an alphabet: of so many numbers one in 10^8 is beyond
_HALVINGS = 14  # of the interval of a step
_LEAST = 1e-3  # a weight, as a share of the largest


def learn_basis(
    model: str,
    importance: Sequence[tuple[float, float]],
    text: Sequence[ChunkKV],
    held_out: Sequence[ChunkKV],
) -> Basis:
    """The basis of the model with the digest ``model`` (see :class:`Basis`): the components of the
    KV of ``text``, whose spreads are those in other text, ``held_out``. ``importance``: of the keys
    and of the values of each layer, by how much the mean square of their errors counts."""
    spec = text[0].spec
    width = 2 * spec.kv_heads * spec.head_dim
    least, most = _LAYERS
    together = min(spec.layers, max(least, min(most, _WIDTH // width)))
    weights = torch.tensor(importance).sqrt()
    weights = weights.clamp_min(_LEAST * float(weights.max()))
    tables = _tables()

    def made(groups: Sequence[GroupBasis], steps: Mapping[int, float]) -> Basis:
        shape = spec.kv_heads, spec.head_dim, together
        return Basis(model, *shape, weights, groups, steps, tables)

    blank = made((), {})
    principal = [
        _principal(_rows(blank, text, number), _rows(blank, held_out, number))
        for number in range(ceil(spec.layers / together))
    ]
    steps = {
        level: _step(principal, tables, _RESERVE * _BFLOAT16 / level) for level in LEVELS.values()
    }
    return made([one.coded(steps) for one in principal], steps)


def _rows(basis: Basis, found: Sequence[ChunkKV], group: int) -> Tensor:
    layers = basis.layers_of(group)
    each = []
    for kv in found:
        planes = [one[layer] for layer in layers for one in (kv.keys, kv.values)]
        each.append(basis.rows(torch.stack(planes), layers))
    return torch.cat(each)


class _Principal(NamedTuple):
    """The principal components of a group's rows."""

    mean: Tensor  # (G,)
    components: Tensor  # (G, G), rows by falling variance
    numbers: Tensor  # (held out, G): other rows, transformed
    scales: Tensor  # (G,): mean magnitudes

    def spreads(self, step: float) -> Tensor:
        """The distribution of each component that is kept, uint8."""
        kinds = [round(4 * log2(max(scale, 1e-30) / step)) + 8 for scale in self.scales.tolist()]
        kept = next((at for at, kind in enumerate(kinds) if kind < 0), len(kinds))
        return torch.tensor(kinds[:kept]).clamp_max(len(_SPREADS) - 1).to(torch.uint8)

    def bits(self, step: float, tables: Tensor) -> float:
        """That a row takes."""
        spreads = self.spreads(step).long()
        middle = tables.shape[1] // 2
        symbols = quantise(self.numbers[:, : len(spreads)], step).clamp(-middle, middle) + middle
        costs = -((tables + 1) / TOTAL).log2()
        each = costs[spreads].T.gather(0, symbols.long())
        return float(each.sum(1).mean())

    def coded(self, steps: Mapping[int, float]) -> GroupBasis:
        spreads = {level: self.spreads(step) for level, step in steps.items()}
        rank = max(map(len, spreads.values()))
        errors = {level: self._error(step, len(spreads[level])) for level, step in steps.items()}
        components = self.components[:rank].half().float()  # as they are stored
        return GroupBasis(self.mean, components, self.scales[:rank].clone(), spreads, errors)

    def _error(self, step: float, kept: int) -> float:
        """The mean squared error of a row."""
        numbers = self.numbers[:, :kept]
        levels = quantise(numbers, step)
        off = numbers - levels.sign() * (levels.abs() - ROUND_UP + 0.5) * step
        return float(off.square().sum(1).mean() + self.numbers[:, kept:].square().sum(1).mean())


def _principal(rows: Tensor, held: Tensor) -> _Principal:
    """The components of ``rows``, and how widely they spread in ``held`` ones: in other text, the
    components of little variance spread more than in that from which they are computed."""
    mean = rows.mean(0)
    rows = rows - mean
    _, vectors = torch.linalg.eigh((rows.T @ rows).double() / len(rows))
    components = vectors.flip(1).T.float().contiguous()
    # A component's sign is arbitrary: its largest number is positive.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components *= largest.sign()
    numbers = (held - mean) @ components.T
    scales = numbers.abs().mean(0)
    order = scales.argsort(descending=True, stable=True)
    return _Principal(mean, components[order], numbers[:, order].contiguous(), scales[order])


def _step(principal: Sequence[_Principal], tables: Tensor, bits: float) -> float:
    """The step at which a number takes so many bits."""
    numbers = sum(len(one.mean) for one in principal)
    largest = max(float(one.scales[0]) for one in principal)
    low, high = largest * 2.0**-12, largest
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        taken = sum(one.bits(middle, tables) for one in principal) / numbers
        low, high = (middle, high) if taken > bits else (low, middle)
    return high


def _tables() -> Tensor:
    """Two-sided geometric distributions: those of quantised numbers of Laplace's distribution."""
    reaches = [ceil(_REACH * spread) + 2 for spread in _SPREADS]
    middle = max(reaches)
    tables = torch.zeros(len(_SPREADS), 2 * middle + 1)
    for table, spread, reach in zip(tables, _SPREADS, reaches, strict=True):
        ratio = 2.718281828459045 ** (-1 / spread)
        beyond = ratio ** (1 - ROUND_UP)  # of the middle
        size = torch.arange(-reach, reach + 1).abs().double()
        shares = beyond * (1 - ratio) / 2 * ratio ** (size - 1)
        shares[reach] = 1 - beyond
        whole = TOTAL - len(shares)
        weights = (shares * whole).floor().clamp_min(1)
        weights[reach] += whole - weights.sum()
        table[middle - reach : middle + reach + 1] = weights.float()
    return tables
