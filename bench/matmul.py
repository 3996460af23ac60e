"""float32 products on this CPU, by torch and by oneDNN: ``python -m bench.matmul``.

The shapes are those of SmolLM2-135M's layers and of Qwen2.5-1.5B's widest one, for few and many
rows, and of attention over 2,000 keys. The shortest of several runs counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.results import machine, table
from ragcache.engine.hf.onednn import is_faster, product

SHAPES = {
    "one row (decoding)": (1, 576, 1536),
    "60 rows": (60, 576, 1536),
    "300 rows": (300, 576, 1536),
    "2,000 rows": (2000, 576, 1536),
    "100 rows of 1.5B": (100, 1536, 8960),
    "scores": (192, 64, 2000),
    "weighted values": (192, 2000, 64),
}


def main() -> None:
    rows = []
    with torch.inference_mode():
        for name, (m, k, n) in SHAPES.items():
            a, b = torch.randn(m, k), torch.randn(n, k)
            seconds = [
                shortest(lambda a=a, b=b: a @ b.T),  # type: ignore[misc]
                shortest(lambda a=a, b=b: product(a, b)),  # type: ignore[misc]
            ]
            off = float((product(a, b) - a @ b.T).abs().max() / (a @ b.T).abs().max())
            rates = [f"{2e-9 * m * k * n / taken:.0f}" for taken in seconds]
            rows.append([name, f"{m} x {k} x {n}", *rates, f"{off:.0e}"])
    print(table(["product", "shape", "torch, GFLOP/s", "oneDNN, GFLOP/s", "difference"], rows))
    print(f"{machine()}; ragcache uses oneDNN: {is_faster()}")


def shortest(work: Callable[[], Tensor], runs: int = 20) -> float:
    """Seconds of the shortest run, after two that are not counted."""
    taken = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken[2:])


if __name__ == "__main__":
    main()
