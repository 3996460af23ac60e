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
    "methods": {
        "random": "random:recompute_ratio=0.15",
        "attention (prophet)": "prophet:recompute_ratio=0.12",
        "norm of attention, middle layers (infoflow)": "infoflow:recompute_ratio=0.13",
        "anchors (qcfuse)": "qcfuse:recompute_ratio=0.13",
        "fused": "fused",
    },
    "score": {
        "attention alone": "fused:error_power=0",
        "error alone, of attended rows": "fused:attention_power=0",
        "attention and error": "fused:attention_power=1,error_power=1",
        "their square roots (fused)": "fused",
        "attention, error^1/4": "fused:error_power=0.25",
        "one step: no error": "fused:recompute_ratio=0.12,candidates=1",
    },
    "probe": {
        "first third of the layers": "fused:layers=first",
        "middle third": "fused:layers=middle",
        "last third": "fused:layers=last",
        "all layers (fused)": "fused",
    },
    "candidates and check layer": {
        "1.5 x": "fused:recompute_ratio=0.11,candidates=1.5",
        "2 x (fused)": "fused",
        "4 x": "fused:recompute_ratio=0.08,candidates=4",
        "2 x, check layer 2": "fused:recompute_ratio=0.1,check_layer=2",
        "2 x, check layer 3": "fused:recompute_ratio=0.09,check_layer=3",
    },
    "neighbours": {
        "none": "fused:successors=0",
        "one successor (fused)": "fused",
        "two successors": "fused:successors=2",
        "windows of 3": "fused:successors=0+windows=3",
        "windows of 8": "fused:successors=0+windows=8",
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
    given = parser.parse_args()
    groups = {name: GROUPS[name] for name in given.group or GROUPS}
    if given.mode:
        groups = {"given": {mode: mode for mode in given.mode}}
    texts = dict.fromkeys(m for g in (REFERENCES, *groups.values()) for m in g.values())
    modes: dict[str, Blender] = {text: blender(text) for text in texts}
    settings = Settings.load(model="tiny", compile=given.compile)
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
