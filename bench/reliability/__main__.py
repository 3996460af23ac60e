"""``python -m bench.reliability [NAME ...] [--rounds N] [--seed S]``.

Without names, all experiments run at full size, and a Markdown table is printed. Exits with 1 and
prints the seed if there was a violation.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time

import torch

from bench.reliability.outcome import Experiment

_MODULES = (
    "kills",
    "corpus",
    "flips",
    "machine",
    "faults",
    "crowd",
    "fuzz",
    "space",
    "timing",
    "soak",
    "shut-out",
    "flood",
    "hostile-remote",
    "stale-write",
)


def experiment(name: str) -> Experiment:
    module = importlib.import_module(f"bench.reliability.{name.replace('-', '_')}")
    return Experiment(module.run, module.FULL, module.SHORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(_MODULES))
    parser.add_argument("--rounds", type=int, help="how many kills, flips, seconds, ...")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="the sizes of the test suite")
    given = parser.parse_args()
    unknown = set(given.names) - set(_MODULES)
    if unknown:
        parser.error(f"no experiment {', '.join(sorted(unknown))}: {', '.join(_MODULES)}")
    torch.set_num_threads(1)  # the process forks later
    logging.disable(logging.INFO)
    chosen = {name: experiment(name) for name in given.names or _MODULES}
    rows, violations = [], 0
    for name, one in chosen.items():
        began = time.perf_counter()
        rounds = given.rounds or (one.short if given.short else one.full)
        outcome = one.run(rounds, given.seed)
        seconds = time.perf_counter() - began
        print(f"{name}: {outcome.size}, {len(outcome.violations)} violations, {seconds:.1f} s")
        for line in outcome.figures:
            print(f"  {line}")
        for line in outcome.grouped_violations():
            print(f"  VIOLATION {line}", flush=True)
        if outcome.violations:
            size = f" --rounds {given.rounds}" if given.rounds else " --short" * given.short
            print(f"  again: python -m bench.reliability {name}{size} --seed {given.seed}")
        violations += len(outcome.violations)
        rows.append(f"| {name} | {outcome.size} | {len(outcome.violations)} | {seconds:.0f} |")
    print("\n| experiment | size | violations | seconds |\n|---|---|--:|--:|", *rows, sep="\n")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
