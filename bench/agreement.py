"""Shared by benchmarks of agreement with full prefill, question by question: the figures of an
answer, outcomes that are saved after every question, and their tables.

Outcomes are a line of JSON for each question, beside a ``.run.json`` that says how they were
measured.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

import numpy as np
from torch import Tensor

from bench.real_results import Facts
from bench.results import commit, machine, table
from ragcache.blend import Blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, RagCacheError
from ragcache.eval.bootstrap import Array, Bootstrap, Estimate
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.metrics import answer_agreement, first_token_kl
from ragcache.models import model_path
from ragcache.planning.context import EncodingContext
from ragcache.store.base import ChunkStore
from ragcache.types import Prompt, Sampling, Tokens

INSTRUCTION = "Only give me the answer and do not output any other words."
TOKENS = 16

Outcome = Mapping[str, Mapping[str, float]]  # by variant, by name of a figure
Pairs = Callable[[Collection[str]], list[tuple[str, str]]]  # of labels, those to compare
_FIGURES = {"kl": "KL", "first": "KL of the first token", "top1": "top-1", "same": "same answer"}
_SHARES = "top1", "same"


@dataclass(frozen=True, slots=True)
class Reply:
    """A greedy answer."""

    tokens: Tokens
    forced: Tensor  # (tokens, vocabulary): logits that predict the forced tokens

    def agreement(self, full: Reply) -> dict[str, float]:
        """The figures of this reply, whose forced tokens are the reply of full prefill."""
        kl, top1 = answer_agreement(full.forced, self.forced)
        same = self.tokens[:TOKENS] == full.tokens[:TOKENS]
        first = first_token_kl(full.forced[0], self.forced[0])
        return {"kl": kl, "top1": top1, "same": float(same), "first": first}


@dataclass(frozen=True)
class Benchmark:
    """Variants that are asked the same questions."""

    about: str | None  # for ``--help``
    labels: Callable[[], Collection[str]]  # of all variants
    #: The outcome of a question with these chunks, of the variants with the given labels.
    ask: Callable[[Engine, Sequence[str], str, Collection[str]], Outcome]
    pairs: Pairs
    note: str = ""  # below the tables
    more: Callable[[Sequence[Outcome]], str] | None = None  # another table

    def main(self) -> None:
        parser = argparse.ArgumentParser(description=self.about)
        parser.add_argument("--model", help="a name or folder, as ragcache takes it")
        parser.add_argument("--set", type=Path, help="a file of bench.questions")
        parser.add_argument(
            "--out",
            type=Path,
            required=True,
            action="append",
            help="outcomes, one line per question",
        )
        parser.add_argument(
            "--only", default="", metavar="TEXT", help="variants with TEXT in the label"
        )
        parser.add_argument("--questions", type=int, default=100)
        parser.add_argument("--chunks", type=int, help="only the first ones of every prompt")
        parser.add_argument("--dtype", default="auto")
        parser.add_argument("--table", type=Path, metavar="PAGE", help="write the tables of --out")
        given = parser.parse_args()
        if given.table is None and (None in (given.model, given.set) or len(given.out) > 1):
            parser.error("give --model, --set and one --out, or --table")
        try:
            if given.table is None:
                self.measure(given)
            text = self.page(given.out)
        except RagCacheError as error:
            parser.exit(1, f"{error}\n")
        if given.table is not None:
            given.table.parent.mkdir(parents=True, exist_ok=True)
            given.table.write_text(text, encoding="utf-8")
        print(text)

    def measure(self, given: argparse.Namespace) -> None:
        """Ask the questions that are not saved yet, and save the outcomes."""
        out: Path = given.out[0]
        labels = [label for label in self.labels() if given.only in label]
        if not labels:
            raise ConfigError(
                f"no variant has {given.only!r} in its label: {'; '.join(self.labels())}"
            )
        with opened(out) as file:
            Facts(machine(), commit(), shlex.join(sys.orig_argv[1:]), given.dtype).save(_facts(out))
            engine = TransformersEngine.load(model_path(given.model), dtype=given.dtype)
            asked = first_questions(load_dataset(given.set), given.questions)
            each = [(context.chunks, q.text) for context in asked for q in context.questions]
            done = len(load(out))
            for number, (chunks, question) in enumerate(each[done:], done + 1):
                outcome = self.ask(engine, chunks[: given.chunks], question, labels)
                file.write(json.dumps(outcome).encode() + b"\n")
                print(f"{number} of {len(each)} questions", flush=True)

    def page(self, files: Sequence[Path]) -> str:
        """The tables of files of outcomes, with how they were measured. Raises ConfigError."""
        outcomes = joined([load(file) for file in files])
        if not outcomes:
            raise ConfigError(f"no question is saved in {' and '.join(map(str, files))}")
        facts = [Facts.load(_facts(file)) for file in files if _facts(file).exists()]
        how = "".join(
            f"\n{f.machine}, {f.dtype}, commit {f.commit}: `{f.command}`\n" for f in facts
        )
        more = "" if self.more is None else f"\n{self.more(outcomes)}"
        note = f"{self.note}\n\n" if self.note else ""
        return f"{shown(outcomes, self.pairs)}{more}\n{note}{len(outcomes)} questions\n{how}"


def reply(
    engine: Engine,
    store: ChunkStore,
    encoding: EncodingContext,
    prompt: Prompt,
    method: Blender,
    forced: Tokens,
) -> Reply:
    """The greedy answer to a prompt whose chunks are stored, and the logits of the tokens
    ``forced``; if there are none, of the answer's own."""
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    stream = generator.stream(
        PromptRequest(prompt, method, Sampling(max_tokens=TOKENS), forced=forced)
    )
    answer = stream.answer
    assert all(chunk.miss is None for chunk in answer.report.chunks) or method.name == "full"
    return Reply(answer.tokens, stream.forced_logits)


def shown(outcomes: Sequence[Outcome], pairs: Pairs) -> str:
    """The table of the variants that were measured with every question, and that of paired
    differences with 95 % intervals."""
    labels = [
        label
        for label, figures in outcomes[0].items()
        if _FIGURES.keys() <= figures.keys() and all(label in one for one in outcomes)
    ]
    means = [
        [
            label,
            *(_shown(fmean(one[label][figure] for one in outcomes), figure) for figure in _FIGURES),
        ]
        for label in labels
    ]
    differences = [
        [one, other, *map(_with_interval, _differences(outcomes, one, other), _FIGURES)]
        for one, other in pairs(labels)
    ]
    heads = _FIGURES.values()
    return "\n".join(
        [table(["variant", *heads], means), table(["variant", "minus", *heads], differences)]
    )


def _differences(outcomes: Sequence[Outcome], one: str, other: str) -> list[Estimate]:
    """The mean difference of every figure, over pairs of the same question."""
    totals = np.array([[1.0, *(o[one][f] - o[other][f] for f in _FIGURES)] for o in outcomes])
    return Bootstrap(totals).estimate(_mean)


def _mean(sums: Array) -> Array:
    means: Array = sums[..., 1:] / sums[..., :1]
    return means


def _shown(value: float, figure: str, sign: str = "") -> str:
    return f"{value:{sign}.0%}" if figure in _SHARES else f"{value:{sign}.3f}"


def _with_interval(found: Estimate, figure: str) -> str:
    value = _shown(found.value, figure, "+")
    if found.interval is None:
        return value
    low, high = (_shown(bound, figure, "+") for bound in found.interval)
    return f"{value} [{low}, {high}]"


def load(path: Path) -> list[dict[str, dict[str, float]]]:
    """The outcomes of a file, by question. An incomplete last line, which a killed run leaves
    behind, is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def joined(files: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """The outcomes of the questions that all files have; a variant that several have is taken from
    the first."""
    found: list[Outcome] = []
    for each in zip(*files, strict=False):
        one: dict[str, Mapping[str, float]] = {}
        for outcome in reversed(each):
            one = {**outcome, **{k: v for k, v in one.items() if k not in outcome}}
        found.append(one)
    return found


def opened(path: Path) -> BinaryIO:
    """A file of outcomes to append to, locked and without an incomplete last line. Raises
    ConfigError if another process has it open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"another process saves outcomes in {path}: wait for it, or name another file"
        ) from error
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _facts(out: Path) -> Path:
    return out.with_suffix(".run.json")
