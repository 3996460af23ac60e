"""Which part of `fused` pays: ``python -m bench.choosing``.

Every row changes one thing. The questions come from seeds of their own: neither the model nor the
published tables have seen them, and what is chosen here is shown there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from examples.train_tiny.freeze import prompt_lines
from examples.train_tiny.world import Binding
from ragcache import show
from ragcache.blend import Blender, blender
from ragcache.dataset import load
from ragcache.evaluate import compare
from ragcache.scores import Figures
from ragcache.settings import Settings

SEED = 80_000_001  # the frozen prompts have 90,000,001 and on
KINDS: dict[Binding, int] = {"direct": 2, "local": 2, "split": 9}

#: Label -> mode. Rows of one group are of like charged budget.
GROUPS: dict[str, dict[str, str]] = {
    "method": {
        "random": "random:recompute_ratio=0.15",
        "first tokens of each chunk (epic)": "epic:first_tokens=6",
        "question attention (prophet)": "prophet:recompute_ratio=0.12",
        "its norm, middle layers (infoflow)": "infoflow:recompute_ratio=0.13",
        "from anchors, middle layers (qcfuse)": "qcfuse:recompute_ratio=0.13",
        "fused": "fused",
    },
    "score": {
        "attention alone": "fused:error_power=0",
        "error alone, of the most attended": "fused:attention_power=0",
        "attention * error": "fused:attention_power=1,error_power=1",
        "attention * sqrt(error)": "fused:attention_power=1",
        "sqrt(attention) * error": "fused:error_power=1",
        "sqrt(attention * error) (fused)": "fused",
    },
    "probe": {
        "question alone": "fused:anchors=0",
        "15 % anchors (fused)": "fused",
        "30 % anchors": "fused:anchors=0.3",
        "everything": "fused:anchors=1",
        "15 % anchors, first third of the layers": "fused:layers=first",
        "15 % anchors, middle third": "fused:layers=middle",
        "15 % anchors, last third": "fused:layers=last",
    },
    "rows per layer": {
        "the same number in all": "fused:taper=0",
        "falling evenly to none": "fused:taper=1",
        "as a square (fused)": "fused",
        "as a cube": "fused:taper=3",
        "after one layer in full": "fused:recompute_ratio=0.04+full_layers=1",
    },
    "neighbours": {
        "none (fused)": "fused",
        "one successor": "fused+successors=1",
        "two successors": "fused+successors=2",
        "windows of 3": "fused+windows=3",
        "windows of 8": "fused+windows=8",
        "first 2 of each chunk": "fused+first=2",
    },
}
REFERENCES = {"full": "full", "reuse": "reuse"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=40)
    parser.add_argument("--group", action="append", choices=list(GROUPS))
    parser.add_argument("--mode", action="append", default=[], help="measure these instead")
    parser.add_argument("--compile", default="prefix")
    parser.add_argument("--model", default="tiny")
    given = parser.parse_args()
    groups = {name: GROUPS[name] for name in given.group or GROUPS}
    if given.mode:
        groups = {"given": {mode: mode for mode in given.mode}}
    texts = dict.fromkeys(m for g in (REFERENCES, *groups.values()) for m in g.values())
    modes: dict[str, Blender] = {text: blender(text) for text in texts}
    settings = Settings.load(model=given.model, compile=given.compile)
    with tempfile.TemporaryDirectory() as folder, show.progress(Console(stderr=True)) as told:
        path = Path(folder) / "choosing.jsonl"
        lines = prompt_lines(SEED, documents=8, contexts=given.contexts, quota=KINDS)
        path.write_text("".join(line + "\n" for line in lines))
        asked = {"questions": load(path)}
        ((_, found),) = compare(settings, asked, modes, max_tokens=8, progress=told)
    figures = {f.mode: f for f in found}
    for name, rows in groups.items():
        print(table(name, REFERENCES | rows, figures))


def table(name: str, rows: dict[str, str], figures: dict[str, Figures]) -> str:
    """In Markdown: exact match by kind with half its interval, KL to full, charged budget."""
    first = next(iter(figures.values()))
    kinds = [kind for kind in KINDS if kind in first.questions]
    heads = [name, *(f"{kind} ({first.questions[kind]})" for kind in kinds), "KL", "charged"]
    lines = [" | ".join(heads), " | ".join(["---", *["--:"] * (len(kinds) + 2)])]
    for label, mode in rows.items():
        f = figures[mode]
        right = (f.exact_match[kind] for kind in kinds)
        cells = [f"{100 * e.value:.1f} ±{100 * (e.half_width or 0):.1f}" for e in right]
        lines.append(" | ".join([label, *cells, f"{f.kl or 0:.3f}", f"{100 * f.charged:.1f} %"]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
