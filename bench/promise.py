"""How often a calibrated promise breaks, on saved outcomes: ``python -m bench.promise``.

The questions of every file that ``python -m bench.real`` saved, one for each context, are divided
at random into two halves, a thousand times: one half calibrates (:mod:`ragcache.eval.promise`), the
cheapest promised method answers the other. The promise breaks if more than a share ε of that half
disagrees with full prefill. With few questions that also happens by chance where the promise is
true, so the share of *all* questions is compared with ε, too. Full prefill, which charges 100 %,
never disagrees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.results import OUTCOMES, table
from ragcache.eval.calibrate import disagreements, sequences
from ragcache.eval.outcomes import ModeOutcomes
from ragcache.eval.outcomes_file import load_outcomes
from ragcache.eval.promise import Promise, Trial
from ragcache.types import Disagreement

LEFT_OUT = {"none"}  # answers without chunks
HEADS = "set", "ε", "questions", "broken", "of all", "disagree", "charged", "full prefill"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method at a budget, on every question."""

    failed: np.ndarray[tuple[int], np.dtype[np.bool_]]
    charged: np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Kept:
    """Means over calibrations."""

    broken: float  # the other half disagrees more often than ε
    broken_of_all: float  # all questions do
    disagree: float  # share of the other half
    charged: float
    full: float  # nothing cheaper was promised


def candidates(
    outcomes: Sequence[ModeOutcomes], disagreement: Disagreement
) -> list[list[Candidate]]:
    """Sequences of candidates on one question of each context. Labels may end in ``%``."""
    first = {o.context: place for place, o in reversed([*enumerate(outcomes[0].outcomes)])}
    places = sorted(first.values())
    kept = [
        replace(one, mode=one.mode.rstrip("%"), outcomes=[one.outcomes[p] for p in places])
        for one in outcomes
        if one.mode not in LEFT_OUT
    ]
    return [
        [
            Candidate(
                np.array(disagreements(one, disagreement)),
                np.array([o.charged for o in one.outcomes]),
            )
            for one in sequence
        ]
        for sequence in sequences(kept)
    ]


def resample(
    every: Sequence[Sequence[Candidate]], promise: Promise, calibrations: int, seed: int = 0
) -> Kept:
    """Calibrate on a random half, answer the other, so many times."""
    random, found = np.random.default_rng(seed), []
    questions = len(every[0][0].failed)
    for _ in range(calibrations):
        order = random.permutation(questions)
        asked, later = order[: questions // 2], order[questions // 2 :]
        promised = [
            one
            for sequence in every
            for one in sequence[
                : promise.kept(
                    [Trial(len(asked), int(c.failed[asked].sum())) for c in sequence], len(every)
                )
            ]
        ]
        best = min(promised, key=lambda one: one.charged[asked].mean(), default=None)
        if best is None:
            found.append((0.0, 0.0, 0.0, 1.0, 1.0))
            continue
        share = best.failed[later].mean()
        broken, of_all = share > promise.epsilon, best.failed.mean() > promise.epsilon
        found.append((broken, of_all, share, best.charged[later].mean(), 0.0))
    return Kept(*map(float, np.mean(found, axis=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all in bench/outcomes")
    parser.add_argument("--epsilon", action="append", type=float, help="default: .05 .1 .2")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--disagreement", choices=("answer", "tokens"), default="answer")
    parser.add_argument("--calibrations", type=int, default=1000)
    given = parser.parse_args()
    rows = []
    for path in given.files or sorted(OUTCOMES.glob("*_outcomes.jsonl")):
        for name, outcomes in load_outcomes(path).items():
            every = candidates(outcomes, given.disagreement)
            for epsilon in given.epsilon or (0.05, 0.1, 0.2):
                kept = resample(every, Promise(epsilon, given.confidence), given.calibrations)
                shares = kept.broken, kept.broken_of_all, kept.disagree, kept.charged, kept.full
                label = f"{path.name.removesuffix('_outcomes.jsonl')}, {name}"
                half = str(len(every[0][0].failed) // 2)
                rows.append([label, f"{epsilon:g}", half, *(f"{share:.1%}" for share in shares)])
    print(table(HEADS, rows), end="")


if __name__ == "__main__":
    main()
