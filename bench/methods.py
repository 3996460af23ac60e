"""Every method on the shipped held-out questions: ``python -m bench.methods``.

Methods are listed by charged budget; their parameters were set on questions of other seeds
(``python -m bench.choosing``, ``ragcache calibrate``) so that budgets are similar. At the end are
the differences of each method to `fused` on the same questions, with 95 % intervals by resampling
contexts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.results import table
from examples.train_tiny.freeze import prompt_lines
from ragcache.cli import render
from ragcache.eval.bootstrap import Estimate
from ragcache.eval.dataset import EvalContext, first_questions, load_dataset
from ragcache.eval.evaluate import compare, make_blenders
from ragcache.eval.summary import ModeSummary
from ragcache.models import TINY, world_file
from ragcache.settings import Settings
from ragcache.util.cores import usable_cores

MODES = (
    "full",
    "reuse",
    "reuse:positions=overlapping",
    "ape:temperature=1.0,scale=0.9",
    "fused:recompute_ratio=0.05",
    "fused:recompute_ratio=0.1",
    "fused",
    "random",
    "prophet:recompute_ratio=0.12",
    "infoflow:recompute_ratio=0.13",
    "qcfuse:recompute_ratio=0.13",
    "epic:first_tokens=6",
    "cachecraft:alpha=0.3",
    "cacheblend",
    "kvshare",
    "random+full_layers=2",
    "fused:recompute_ratio=0.29",
    "cacheblend:check_layer=2",
    "random+full_layers=3",
)
QUESTIONS = 3613  # 121 whole contexts: at least 1,000 direct, local and split questions
HOPS = 1000  # hop questions; the contexts above have less than half as many
HOP_SEED = 95_000_001  # not used for other prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", action="append", help="measure these instead")
    parser.add_argument("--against", default="fused")
    parser.add_argument("--model", default=TINY, help="another that knows the world, by folder")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="0: only hops")
    parser.add_argument("--hops", type=int, default=HOPS, help="of contexts of their own; 0: none")
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--encoding-context", default="prefix")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    asked = {}
    if given.questions:
        asked["prompts.jsonl"] = first_questions(
            load_dataset(world_file("prompts.jsonl")), given.questions
        )
    if given.hops:
        asked["hops"] = hops(given.hops)
    settings = Settings.load(model=given.model, encoding_context=given.encoding_context)
    with render.progress(Console(stderr=True)) as told:
        done = compare(
            settings,
            asked,
            make_blenders(given.mode or MODES),
            against=given.against,
            max_tokens=8,
            processes=given.processes,
            progress=told,
        )
        rows = []
        for name, found in done:
            print(name, answers(found), differences(found), sep="\n\n", flush=True)
            rows += [{"dataset": name} | f.as_json() for f in found]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def hops(count: int) -> list[EvalContext]:
    """``count`` questions that need two facts, with held-out names and sentence forms."""
    lines = prompt_lines(HOP_SEED, documents=8, contexts=count, quota={"hop": 9})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hops.jsonl"
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["questions"]))
        return first_questions(load_dataset(path), count)


def answers(found: Sequence[ModeSummary]) -> str:
    """Exact match by kind, recovery of what reuse loses, and cost, in Markdown."""
    kinds = list(found[0].questions)
    lost = [kind for kind in kinds if kind in found[0].recovery]
    heads = ["mode", *(f"{kind} ({found[0].questions[kind]:,})" for kind in kinds)]
    heads += [*(f"{kind} recovered" for kind in lost), "KL", "recomputed", "charged", "TTFT"]
    rows = []
    for f in found:
        right = (f"{100 * f.exact_match[kind].value:.1f}" for kind in kinds)
        recovered = (interval(f.recovery[kind]) for kind in lost)
        shares = (f"{100 * share:.0f} %" for share in (f.recomputed, f.charged))
        faster = f"1 / {f.speedup or 0:.1f}"
        rows.append([f"`{f.mode}`", *right, *recovered, f"{f.kl or 0:.3f}", *shares, faster])
    return table(heads, rows)


def differences(found: Sequence[ModeSummary]) -> str:
    """Exact match minus that of the mode compared with, in points, in Markdown."""
    kinds = list(found[0].questions)
    rows = [
        [f"`{f.mode}`", *(interval(f.difference[kind]) for kind in kinds), mean(f)]
        for f in found
        if f.mode != f.against
    ]
    return table([f"minus `{found[0].against}`", *kinds, "mean"], rows)


def mean(figures: ModeSummary) -> str:
    return interval(figures.mean_difference) if figures.mean_difference else ""


def interval(estimate: Estimate) -> str:
    ends = estimate.interval
    text = f"{100 * estimate.value:.1f}"
    return text if ends is None else f"{text} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


if __name__ == "__main__":
    main()
