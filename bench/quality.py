"""The README's table of answers: ``python -m bench.quality FIGURES.json...``.

The files are what ``ragcache eval --json`` writes; several of them, from runs over the same
questions in different modes, make one table, and every dataset has its own. ``--intervals`` adds
the 95 % intervals of exact match.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ragcache.show import size

Figures = dict[str, Any]

KINDS = "direct", "local", "split", "hop"  # in this order; other kinds follow as they come


def cell(figures: Figures, kind: str, intervals: bool) -> str:
    text = f"{100 * figures['exact_match'][kind]:.1f}"
    ends = figures.get("intervals", {}).get("exact_match", {}).get(kind) if intervals else None
    return f"{text} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else text


def row(figures: Figures, kinds: list[str], intervals: bool = False) -> str:
    right = (cell(figures, kind, intervals) for kind in kinds)
    shares = (f"{100 * figures[name]:.0f} %" for name in ("recomputed", "charged_budget"))
    return " | ".join((f"`{figures['mode']}`", *right, *shares, size(figures["bytes_loaded"])))


def table(figures: list[Figures], intervals: bool = False) -> str:
    """In Markdown; a mode that comes twice stands where it first came, with what came last."""
    asked = figures[0]["questions"]
    assert all(f["questions"] == asked for f in figures), "runs over different questions"
    kinds = [kind for kind in KINDS if kind in asked]
    kinds += [kind for kind in asked if kind not in KINDS]
    heads = [f"{kind} ({asked[kind]:,})" for kind in kinds]
    lines = [" | ".join(["mode", *heads, "recomputed", "charged", "loaded"])]
    lines += [row(f, kinds, intervals) for f in {f["mode"]: f for f in figures}.values()]
    head, *rows = (f"| {line} |" for line in lines)
    return "\n".join([head, "|---" + "|--:" * (len(kinds) + 3) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--intervals", action="store_true", help="with 95 %% intervals")
    given = parser.parse_args()
    datasets: dict[str, list[Figures]] = {}
    for figures in (f for path in given.files for f in json.loads(path.read_text())):
        datasets.setdefault(figures.get("dataset", ""), []).append(figures)
    for name, found in datasets.items():
        if len(datasets) > 1:
            print(f"\n{name}\n")
        print(table(found, given.intervals))


if __name__ == "__main__":
    main()
