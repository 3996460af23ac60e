"""Measure a mode on KVShareArena, and what its columns are made of: full prefill and no context.

    git clone https://github.com/xishi404/KVShareArena
    pip install ./KVShareArena
    python -m examples.arena --model Qwen/Qwen3-8B --subset hotpotqa \\
        --data KVShareArena/data/queryset --mode fused --ratio 0.15 --out results

A run whose results are in ``--out`` is not repeated. ``kva validate``, ``kva score`` and ``kva
submit`` of the board take the file of the mode.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from kvsharearena import register
from kvsharearena.harness import run
from kvsharearena.scoring import pgr

from examples.arena.driver import RagCacheRepair
from ragcache import ConfigError
from ragcache.eval.evaluate import make_blenders

HEADS = "method", "F1", "PGR", "compute saved", "TTFT saved", "reuse rate", "loaded", "peak memory"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m examples.arena", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--subset", required=True, help="qasper, multifieldqa_en or hotpotqa")
    parser.add_argument("--data", required=True, type=Path, help="the board's data/queryset")
    parser.add_argument("--mode", default="fused")
    parser.add_argument("--ratio", type=float)
    parser.add_argument(
        "--questions",
        type=int,
        default=100,
        choices=range(1, 101),
        metavar="N",
        help="the first N of 100; fewer than all cannot be submitted",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    args = parser.parse_args(arguments)
    named = [("none", None), ("full", None)]
    make_blenders([args.mode], [] if args.ratio is None else [args.ratio])  # raises for a bad one
    named += [] if args.mode in ("none", "full") else [(args.mode, args.ratio)]
    found = {method_name(mode, ratio): results(args, mode, ratio) for mode, ratio in named}
    print(table(found))


def method_name(mode: str, ratio: float | None) -> str:
    """A name that the board can make a folder of."""
    return re.sub(r"[^\w.]+", "_", f"ragcache {mode}" + ("" if ratio is None else f" {ratio:g}"))


def results(args: Namespace, mode: str, ratio: float | None) -> dict[str, Any]:
    """The board's document on a method, from its file if it has been measured. Raises ConfigError
    if that is of another run."""
    name = method_name(mode, ratio)
    path = args.out / f"{name}_{args.subset}.json"
    if path.exists():
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        of = made["summary"]["model"], made["summary"]["n"]
        if of != (args.model, args.questions):
            raise ConfigError(
                f"{path} is of {of[0]} and {of[1]} questions: name another folder for the results"
            )
        return made
    made = run(
        registered(name),
        args.model,
        "re",
        args.subset,
        n=args.questions,
        data_dir=str(args.data),
        method_cfg={"mode": mode, "ratio": ratio},
    )
    args.out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(made, indent=2, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(path)
    return made


@cache
def registered(name: str) -> str:
    """Make ragcache known to the board under a name of its own for each mode and ratio."""
    register(name)(type(name, (RagCacheRepair,), {}))
    return name


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each method. Savings are relative to full prefill by the same engine."""
    (none, full), rows = list(found)[:2], {name: made["results"] for name, made in found.items()}

    def mean(name: str, key: str) -> float:
        return fmean({**row, **row["aux"]}[key] for row in rows[name])

    lines = ["\t".join(HEADS)]
    for name in found:
        recovered = pgr(*(mean(each, "f1_raw") for each in (name, none, full)))
        memory = mean(name, "peak_gpu_mb") or mean(name, "peak_rss_mb")
        cells = (
            name,
            f"{mean(name, 'f1_raw'):.3f}",
            "-" if recovered is None else f"{recovered:.3f}",
            "-" if name == none else f"{1 - mean(name, 'charged'):.1%}",
            f"{1 - mean(name, 'ttft_ms') / mean(full, 'ttft_ms'):.1%}",
            f"{mean(name, 'reuse_rate'):.1%}",
            f"{mean(name, 'bytes_loaded') / 1e6:,.1f} MB",
            f"{memory:,.0f} MB",
        )
        lines.append("\t".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
