"""Kernels on a GPU: ``python -m bench.kernels``.

Placing: the stored KV of eight chunks of 512 tokens is written to its rows of one layer, its keys
rotated; GB/s count what is read and written. Attention: a share of a prompt's rows, spread at
random, in one layer, each row to the keys up to itself. *SDPA* is given a mask, as by transformers,
and never runs on cuDNN; *Triton* is ragcache's kernel. All in bfloat16. Times are medians on the
device, after a warm-up that compiles, with its cache cleared before each run. Results are compared
with torch's and SDPA's: *off* is the largest error of a vector, relative to its norm.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench import results
from ragcache.cli import render
from ragcache.engine.hf.rope import Rope
from ragcache.engine.kernels import choose as kernels
from ragcache.engine.kernels.choose import (
    AttentionShape,
    Trial,
    attention_trials,
    placing_trial,
    relative_error,
)
from ragcache.engine.kernels.row_attention import TritonRowAttention

#: Query heads, KV heads, head_dim.
MODELS = {"Llama-3.1-8B": (32, 8, 128), "Qwen2.5-0.5B": (14, 2, 64)}
ROWS = 4096, 8192, 32768
SHARES = 0.05, 0.15, 0.3
ATTENTION = {"SDPA": None, "Triton": TritonRowAttention}


@dataclass(frozen=True)
class Placing:
    model: str
    moved: int  # bytes read and written
    torch_s: float
    triton_s: float | None  # None: it failed


@dataclass(frozen=True)
class Attending:
    model: str
    rows: int  # of the prompt
    share: float  # of them that attend
    seconds: dict[str, float | None]  # by way of attending; None: it failed
    off: dict[str, float | None]


@dataclass(frozen=True)
class Found:
    device: str
    placing: list[Placing]
    attending: list[Attending]
    failed: list[str]  # what does not run, or computes something else: it has no time


def measure(
    models: Sequence[str] = tuple(MODELS),
    rows: Sequence[int] = ROWS,
    shares: Sequence[float] = SHARES,
    ways: Sequence[str] = tuple(ATTENTION),
) -> Found:
    """Every model at every size. What fails does not end the run: the others go on."""
    where = torch.device("cuda")
    found = Found(torch.cuda.get_device_name(where), [], [], [])
    sizes = [(name, count, share) for name in models for count in rows for share in shares]
    with render.progress(Console(stderr=True)) as told:
        for name in models:
            found.placing.append(placing(name, where, found.failed))
        for done, size in enumerate(sizes):
            told("attention", done, len(sizes))
            found.attending.append(attending(*size, ways, where, found.failed))
            torch.cuda.empty_cache()
        told("attention", len(sizes), len(sizes))
    return found


def placing(name: str, where: torch.device, failed: list[str]) -> Placing:
    shape = AttentionShape(*MODELS[name], torch.bfloat16, where)
    by_torch = placing_trial(
        partial(kernels.place_by_torch, Rope(apply_rotary_pos_emb, halves=True)), shape
    )
    by_triton = placing_trial(kernels.place_by_triton, shape)
    want = by_torch().clone()
    seconds, _ = tried(f"{name}: placing by Triton", by_triton, want, failed)
    return Placing(name, 2 * want.nbytes, timed(by_torch), seconds)


def attending(
    name: str,
    rows: int,
    share: float,
    ways: Sequence[str],
    where: torch.device,
    failed: list[str],
) -> Attending:
    shape = AttentionShape(*MODELS[name], torch.bfloat16, where)
    want = attention_trials(None, shape, rows, share)[0]().clone()
    seconds: dict[str, float | None] = {}
    off: dict[str, float | None] = {}
    for way in ways:
        work = attention_trials(ATTENTION[way], shape, rows, share)[0]
        what = f"{name}: {way} for {share:.2f} of {rows:,} rows"
        seconds[way], off[way] = tried(what, work, want, failed)
    return Attending(name, rows, share, seconds, off)


def tried(
    what: str, work: Trial, want: Tensor, failed: list[str]
) -> tuple[float | None, float | None]:
    """Seconds, and how far the result is off; None, and a line in ``failed``, if it is wrong."""
    try:
        off = relative_error(work(), want)
        if off <= kernels.TOLERANCE[want.dtype]:
            return timed(work), off
        failed.append(f"{what} is off by {off:.1e}")
    except Exception as failure:  # of a compiler or a driver: it may be of any kind
        failed.append(f"{what} fails: {type(failure).__name__}: {failure}")
    return None, None


def timed(work: Trial) -> float:
    """Seconds on the device."""
    from triton.testing import do_bench

    return float(do_bench(work, return_mode="median")) / 1e3


def table(found: Found) -> str:
    placing = results.table(
        ["model", "torch ms", "GB/s", "Triton ms", "GB/s", "times as fast"],
        [
            [
                each.model,
                f"{1e3 * each.torch_s:.3f}",
                f"{each.moved / each.torch_s / 1e9:,.0f}",
                *(
                    ("–", "–", "–")
                    if each.triton_s is None
                    else (
                        f"{1e3 * each.triton_s:.3f}",
                        f"{each.moved / each.triton_s / 1e9:,.0f}",
                        f"{each.torch_s / each.triton_s:.2f}",
                    )
                ),
            ]
            for each in found.placing
        ],
    )
    ways = list(found.attending[0].seconds) if found.attending else []
    attending = results.table(
        ["model", "rows", "share", *(f"{way} ms" for way in ways), *(f"{way} off" for way in ways)],
        [
            [
                each.model,
                f"{each.rows:,}",
                f"{each.share:.2f}",
                *("–" if s is None else f"{1e3 * s:.3f}" for s in each.seconds.values()),
                *("–" if off is None else f"{off:.1e}" for off in each.off.values()),
            ]
            for each in found.attending
        ],
    )
    failed = "".join(f"\n- {line}\n" for line in found.failed)
    return f"{found.device}\n\nPlacing:\n\n{placing}\nAttention:\n\n{attending}{failed}"


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="of prompts")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--ways", nargs="+", default=list(ATTENTION), choices=ATTENTION)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.kernels needs CUDA, and torch finds no GPU here: run it where there is one")
    found = measure(given.models, given.rows, given.shares, given.ways)
    results.finish("kernels", found, table(found), given.out)
    sys.exit(bool(found.failed))


if __name__ == "__main__":
    main()
