"""How many bits a number of KV takes if several layers are transformed together: ``python -m
bench.layer_groups --model MODEL --set FILE``.

The KV of the chunks of a data set (``python -m bench.questions``), computed as a store has it, is
transformed to principal components, which are computed from one half of the chunks. The other half
is coded by them at the high-rate bound of Gaussian components, with the same mean squared error in
every component that has more variance than that (reverse water-filling). Printed is the least
number of bits for the same total error, relative to the variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from bench.results import machine, table
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.dataset import load_dataset
from ragcache.models import model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context

GROUPS = 1, 2, 3, 5
ERRORS = 0.003, 0.01, 0.03
HEADS = "transformed together", *(f"bits at an error of {error:.1%}" for error in ERRORS)
_HALVINGS = 40


def planes(model: str, path: Path, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, (rows, kv_heads * head_dim), centred, each plane over its
    usual magnitude."""
    engine = TransformersEngine.load(model_path(model), dtype="float32")
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    texts = dict.fromkeys(chain.from_iterable(one.chunks for one in load_dataset(path)))
    found, left = [], tokens
    for text in texts:
        ids = engine.template.chunk(text)
        found += engine.encode([ids], context=encoding.before(ids))
        left -= len(ids)
        if left <= 0:
            break

    def rows(layer: int, kind: str) -> Tensor:
        each = [getattr(kv, kind)[layer].transpose(0, 1).flatten(1) for kv in found]
        plane = torch.cat(each)
        plane = plane - plane.mean(0)
        return plane / plane.square().mean().sqrt()

    return [(rows(layer, "keys"), rows(layer, "values")) for layer in range(engine.spec.layers)]


def variances(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the components of the first half, in it and in the second half."""
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    found, vectors = torch.linalg.eigh((first.T @ first).double() / len(first))
    return found.clamp_min(1e-12), (second @ vectors.float()).square().mean(0).double()


def bits(components: Sequence[tuple[Tensor, Tensor]], error: float) -> float:
    """For a number, at this mean squared error of the second half."""
    first = torch.cat([one for one, _ in components])
    second = torch.cat([other for _, other in components])
    low, high = 1e-9, float(first.max())
    for _ in range(_HALVINGS):
        level = (low * high) ** 0.5
        off = torch.where(first > level, level, second).mean()
        low, high = (low, level) if off > error * second.mean() else (level, high)
    return float((0.5 * (first / low).log2().clamp_min(0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a name or folder, as ragcache takes it")
    parser.add_argument("--set", type=Path, required=True, help="a file of bench.questions")
    parser.add_argument("--tokens", type=int, default=14_000)
    given = parser.parse_args()
    layers = planes(given.model, given.set, given.tokens)
    rows = []
    for count in GROUPS:
        groups = [layers[at : at + count] for at in range(0, len(layers), count)]
        apart = [
            torch.cat([pair[kind] for pair in group], 1) for group in groups for kind in (0, 1)
        ]
        joint = [torch.cat([plane for pair in group for plane in pair], 1) for group in groups]
        for what, each in (("keys, values", apart), ("keys with values", joint)):
            components = [variances(one) for one in each]
            label = f"{what} of {count} layer{'s' if count > 1 else ''}"
            rows.append([label, *(f"{bits(components, error):.2f}" for error in ERRORS)])
    print(f"{machine()}; {given.model}, {len(layers[0][0]):,} tokens\n")
    print(table(HEADS, rows), end="")


if __name__ == "__main__":
    main()
