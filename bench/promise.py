"""How often a calibrated promise breaks, on saved outcomes: ``python -m bench.promise``, and the
same with escalation, where the outcomes have the margins of first tokens.

The questions of every file that ``python -m bench.real`` saved, one for each context, are divided
at random into two halves, a thousand times: one half calibrates (:mod:`ragcache.eval.promise`), the
cheapest promised method answers the other. The promise breaks if more than a share ε of that half
disagrees with full prefill without being escalated. With few questions that also happens by chance
where the promise is true, so the share of *all* questions is compared with ε, too. Full prefill,
which charges 100 %, never disagrees, and takes the place of what charges more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from bench.results import OUTCOMES, table
from ragcache.eval.calibrate import Candidate, chains, sequence_share
from ragcache.eval.outcomes import ModeOutcomes
from ragcache.eval.outcomes_file import load_outcomes
from ragcache.eval.promise import Promise
from ragcache.types import Disagreement

LEFT_OUT = {"none"}  # answers without chunks
HEADS = (
    *("set", "ε", "questions", "escalation", "broken", "of all", "disagree", "escalated"),
    *("charged", "full prefill"),
)


@dataclass(frozen=True, slots=True)
class Kept:
    """Means over calibrations."""

    broken: float  # the other half disagrees more often than ε
    broken_of_all: float  # all questions do
    disagree: float  # share of the other half
    escalated: float
    charged: float
    full: float  # nothing cheaper was promised


def candidates(
    outcomes: Sequence[ModeOutcomes], disagreement: Disagreement, *, escalate: bool = False
) -> list[list[list[Candidate]]]:
    """Chains of sequences of candidates, on one question of each context. Labels may end in
    ``%``."""
    first = {o.context: place for place, o in reversed([*enumerate(outcomes[0].outcomes)])}
    places = sorted(first.values())
    kept = [
        replace(one, mode=one.mode.rstrip("%"), outcomes=[one.outcomes[p] for p in places])
        for one in outcomes
        if one.mode not in LEFT_OUT
    ]
    return chains(kept, disagreement, escalate=escalate)


def resample(
    every: Sequence[Sequence[Sequence[Candidate]]],
    promise: Promise,
    calibrations: int,
    seed: int = 0,
) -> Kept:
    """Calibrate on a random half, answer the other, so many times."""
    random, found = np.random.default_rng(seed), []
    questions, share = len(every[0][0][0].failed), sequence_share(every)
    for _ in range(calibrations):
        order = random.permutation(questions)
        asked, later = order[: questions // 2], order[questions // 2 :]
        promised: list[Candidate] = []
        for chain in every:
            trials = [[one.trial(asked) for one in sequence] for sequence in chain]
            for sequence, passed in zip(chain, promise.kept(trials, share), strict=True):
                promised += sequence[: passed.candidates]
        best = min(promised, key=lambda one: one.charged[asked].mean(), default=None)
        if best is None or best.charged[asked].mean() >= 1:
            found.append((0.0, 0.0, 0.0, 0.0, 1.0, 1.0))
            continue
        failed = best.failed[later].mean()
        broken, of_all = failed > promise.epsilon, best.failed.mean() > promise.epsilon
        costs = best.escalated[later].mean(), best.charged[later].mean()
        found.append((broken, of_all, failed, *costs, 0.0))
    return Kept(*map(float, np.mean(found, axis=0)))


def has_margins(outcomes: Sequence[ModeOutcomes]) -> bool:
    return all(o.margin is not None for one in outcomes for o in one.outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all in bench/outcomes")
    parser.add_argument("--method", action="append", help="to calibrate; default: all")
    parser.add_argument("--epsilon", action="append", type=float, help="default: .05 .1 .2")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--disagreement", choices=("answer", "tokens"), default="answer")
    parser.add_argument("--calibrations", type=int, default=1000)
    given = parser.parse_args()
    rows = []
    for path in given.files or sorted(OUTCOMES.glob("*_outcomes.jsonl")):
        for name, outcomes in load_outcomes(path).items():
            tried = [
                one
                for one in outcomes
                if not given.method or one.method in given.method or one.mode == "full"
            ]
            for escalate in (False, True) if has_margins(tried) else (False,):
                every = candidates(tried, given.disagreement, escalate=escalate)
                label = f"{path.name.removesuffix('_outcomes.jsonl')}, {name}"
                half = str(len(every[0][0][0].failed) // 2)
                for epsilon in given.epsilon or (0.05, 0.1, 0.2):
                    promise = Promise(epsilon, given.confidence)
                    kept = resample(every, promise, given.calibrations)
                    shares = (f"{share:.1%}" for share in astuple(kept))
                    cells = f"{epsilon:g}", half, "yes" if escalate else "no"
                    rows.append([label, *cells, *shares])
    print(table(HEADS, rows), end="")


if __name__ == "__main__":
    main()
