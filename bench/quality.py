"""The README's table of answers: ``python -m bench.quality FIGURES.json...``.

The files are what ``ragcache eval --json`` writes; several of them, from runs over the same
questions in different modes, make one table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ragcache.show import size


def row(figures: dict[str, Any], kinds: list[str]) -> str:
    right = (f"{100 * figures['exact_match'][kind]:.1f}" for kind in kinds)
    shares = (f"{100 * figures[name]:.0f} %" for name in ("recomputed", "charged_budget"))
    return " | ".join((f"`{figures['mode']}`", *right, *shares, size(figures["bytes_loaded"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    figures = [f for path in parser.parse_args().files for f in json.loads(path.read_text())]
    asked = figures[0]["questions"]
    assert all(f["questions"] == asked for f in figures), "runs over different questions"
    kinds = sorted(asked, key=["direct", "local", "split", "hop"].index)
    heads = [f"{kind} ({asked[kind]:,})" for kind in kinds]
    print("| " + " | ".join(["mode", *heads, "recomputed", "charged", "loaded"]) + " |")
    print("|---" + "|--:" * (len(kinds) + 3) + "|")
    for one in {f["mode"]: f for f in figures}.values():
        print(f"| {row(one, kinds)} |")


if __name__ == "__main__":
    main()
