"""What a run of :mod:`bench.real` saves: outcomes, budgets, and where it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter

from bench.budgets import Budgets
from bench.real_models import MODELS
from ragcache.errors import SourceError
from ragcache.eval.outcomes import ModeOutcomes
from ragcache.eval.outcomes_file import load_outcomes
from ragcache.eval.summary import ModeSummary, figures

DATA_SETS: Mapping[str, str] = {
    "articles": "Articles",
    "hotpotqa": "HotpotQA",
    "hotpotqa-split": "HotpotQA, split paragraphs",
    "musique": "MuSiQue",
}


@dataclass(frozen=True)
class Facts:
    """How and where a run was measured."""

    machine: str
    commit: str
    command: str  # the arguments of Python
    dtype: str

    def save(self, path: Path) -> None:
        path.write_bytes(TypeAdapter(Facts).dump_json(self, indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Facts:
        return TypeAdapter(cls).validate_json(path.read_bytes())


@dataclass(frozen=True)
class RunFiles:
    """The files of one model and data set in the folder ``out``."""

    out: Path
    model: str  # a key of MODELS
    data: str  # a key of DATA_SETS

    @property
    def outcomes(self) -> Path:
        return self._file("outcomes.jsonl")

    @property
    def budgets(self) -> Path:
        return self._file("budgets.json")

    @property
    def facts(self) -> Path:
        return self._file("run.json")

    def _file(self, ending: str) -> Path:
        return self.out / f"{self.model}_{self.data}_{ending}"


@dataclass(frozen=True)
class Results:
    """The outcomes of one model and data set, with what is needed to describe them."""

    model: str
    data: str
    facts: Facts
    budgets: Budgets
    outcomes: list[ModeOutcomes]

    @classmethod
    def load(cls, files: RunFiles) -> Results:
        ((_, outcomes),) = load_outcomes(files.outcomes).items()
        facts, budgets = Facts.load(files.facts), Budgets.load(files.budgets)
        return cls(files.model, files.data, facts, budgets, outcomes)

    @property
    def title(self) -> str:
        return f"{MODELS[self.model].title}, {DATA_SETS[self.data]}"

    @property
    def questions(self) -> int:
        return len(self.outcomes[0].outcomes)

    @cached_property
    def summaries(self) -> list[ModeSummary]:
        return figures(self.outcomes)

    def compared(self, modes: Mapping[str, str], against: str) -> list[ModeSummary]:
        """Summaries of the ``modes``, by label, with differences from the mode ``against``."""
        return figures([one for one in self.outcomes if one.mode in modes], against)


def load_results(out: Path) -> list[Results]:
    """The results of all runs in a folder that have answered questions, in the order of models and
    data sets. Raises SourceError if there are none."""
    every = [RunFiles(out, model, data) for data in DATA_SETS for model in MODELS]
    # The first line of a file is its header, and is there before the first question.
    found = [files for files in every if files.outcomes.exists() and _lines(files.outcomes) > 1]
    if not found:
        raise SourceError(f"{out} has no results: run `python -m bench.real --out {out}` first")
    return [Results.load(files) for files in found]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
