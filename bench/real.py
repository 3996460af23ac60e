"""Measure fusion methods on real models and questions.

``python -m bench.real --model smollm2 --set hotpotqa --models DIR --sets DIR --out DIR`` asks the
questions of one data set (``python -m bench.questions``) of one model (``python -m
bench.real_models``). Every fusion method runs at the charged budgets of 5, 10, 15 and 20 %, as far
as it can: the parameters are found first, on the first prompts. Outcomes are saved after every
question; the same command goes on where it was stopped.

``python -m bench.real --tables DIR`` writes docs/real-models.md from all that is saved in a folder;
what the page was written from is in bench/outcomes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from bench import real_page
from bench.agreement import INSTRUCTION
from bench.budgets import METHODS, TARGETS, Budgets, find_budgets, narrow_model
from bench.real_models import MODELS
from bench.real_results import DATA_SETS, Facts, RunFiles
from bench.results import OUTCOMES, ROOT, commit, machine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, RagCacheError
from ragcache.eval.dataset import EvalContext, first_questions, load_dataset
from ragcache.eval.evaluate import compare, evaluate, make_blenders
from ragcache.models.checkpoint import Checkpoint
from ragcache.settings import Settings
from ragcache.store.disk.store import DiskStore

WITHOUT_BUDGET = "full", "none", "prefix", "reuse", "ape"
PROMPTS = 3  # on which charged budgets are measured
MAX_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--set", choices=DATA_SETS)
    parser.add_argument("--models", type=Path, help="folder with NAME.gguf, or with folders NAME")
    parser.add_argument("--sets", type=Path, help="folder that bench.questions wrote")
    parser.add_argument("--out", type=Path, default=OUTCOMES, help="results")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="stop after these; go on by the same command")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--budget", action="append", type=float, help="default: .05 .1 .15 .2")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="to measure budgets on")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--dtype", help="default: what the table of models says")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tables", type=Path, metavar="DIR", help="write the page from DIR")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "real-models.md")
    given = parser.parse_args()
    try:
        if given.tables is not None:
            real_page.write(given.tables, given.page)
            print(f"wrote {given.page}")
            return
        if None in (given.model, given.set, given.models, given.sets):
            parser.error("give --model, --set, --models and --sets, or --tables")
        measure(given)
    except RagCacheError as error:
        parser.exit(1, f"{error}\n")


def measure(given: argparse.Namespace) -> None:
    """Find budgets, ask the questions, and save both."""
    run = RunFiles(given.out, given.model, given.set)
    run.out.mkdir(parents=True, exist_ok=True)
    settings = Settings.load(
        model=str(_model_file(given.models, given.model)),
        dtype=given.dtype or MODELS[given.model].dtype,
    )
    contexts = load_dataset(given.sets / f"{given.set}.jsonl")
    asked = {given.set: first_questions(contexts, given.questions)}
    budgets = _budgets(run, settings, contexts, given)
    for label, mode in budgets.modes.items():
        print(f"{label}: {mode}", flush=True)
    for label, why in budgets.refused.items():
        print(f"{label} is left out: {why}", flush=True)
    plain = [name for name in WITHOUT_BUDGET if name not in budgets.refused]
    modes = make_blenders(plain) | {
        label: made
        for label, mode in budgets.modes.items()
        for made in make_blenders([mode]).values()
    }
    facts = Facts(machine(), commit(), shlex.join(sys.orig_argv[1:]), settings.dtype)
    facts.save(run.facts)
    try:
        list(
            compare(
                settings,
                asked,
                modes,
                max_tokens=given.max_tokens,
                instruction=INSTRUCTION,
                processes=given.processes,
                progress=_Progress(f"{given.model}, {given.set}", given.minutes),
                save=run.outcomes,
                note=print,
            )
        )
    except _TimeIsUp:
        print("the time is up: go on by the same command", flush=True)


def _model_file(folder: Path, name: str) -> Path:
    """Raises ConfigError."""
    for path in (folder / f"{name}.gguf", folder / name):
        if path.exists():
            return path
    raise ConfigError(
        f"there is no {name}.gguf in {folder}: run `python -m bench.real_models {name} --out "
        f"{folder}`"
    )


def _budgets(
    run: RunFiles, settings: Settings, contexts: Sequence[EvalContext], given: argparse.Namespace
) -> Budgets:
    """Those that were saved before, or else measured now and saved."""
    if run.budgets.exists():
        print(f"charged budgets: taken from {run.budgets}", flush=True)
        return Budgets.load(run.budgets)
    first = first_questions(contexts, given.prompts)
    names = given.method or list(METHODS)
    targets = given.budget or TARGETS
    model = Checkpoint.of(settings.model).folder
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        narrow = Path(folder) / given.model  # messages name the model by its folder
        narrow_model(model, narrow)
        refused = _refused(TransformersEngine.load(narrow, dtype=settings.dtype), first)
        found = Budgets(len(first), {}, {}, refused)
        for path, by_content in ((narrow, False), (model, True)):
            chosen = [name for name in names if METHODS[name].by_content == by_content]
            if chosen:
                print(f"charged budgets: measuring {', '.join(chosen)}", flush=True)
                engine = TransformersEngine.load(path, dtype=settings.dtype)
                prompts = first[:1] if by_content else first  # a whole model takes its time
                measure = partial(_charged, engine, prompts)
                found |= find_budgets(chosen, targets, measure, prompts=len(first))
    found.save(run.budgets)
    return found


def _refused(engine: TransformersEngine, contexts: Sequence[EvalContext]) -> dict[str, str]:
    """The modes without a parameter that the model cannot use, and why."""
    found = {}
    for mode in WITHOUT_BUDGET:
        try:
            _charged(engine, contexts, [mode])
        except RagCacheError as error:
            found[mode] = str(error)
    return found


def _charged(
    engine: TransformersEngine, contexts: Sequence[EvalContext], modes: Sequence[str]
) -> list[float]:
    """The mean charged budget of each mode."""
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder, DiskStore(folder) as store:
        found = evaluate(
            engine,
            store,
            contexts,
            make_blenders(modes),
            max_tokens=MAX_TOKENS,
            instruction=INSTRUCTION,
        )
    return [fmean(outcome.charged for outcome in one.outcomes) for one in found]


class _TimeIsUp(Exception):
    pass


class _Progress:
    """Prints a line per question; raises _TimeIsUp after ``minutes``."""

    def __init__(self, name: str, minutes: float | None) -> None:
        self.name, self.minutes = name, minutes
        self.began = time.monotonic()
        self.first: int | None = None  # questions that were done at the beginning
        self.done = -1

    def __call__(self, data: str, done: int, total: int) -> None:
        spent = time.monotonic() - self.began
        if self.first is None:
            self.first = done
        if done != self.done:
            self.done = done
            each = f", {spent / (done - self.first):.0f} s each" if done > self.first else ""
            print(f"{self.name}: {done} of {total} questions{each}", flush=True)
        if self.minutes is not None and spent > 60 * self.minutes and done < total:
            raise _TimeIsUp


if __name__ == "__main__":
    main()
