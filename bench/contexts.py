"""Measure what it costs to compute chunks after a context that belongs to the model.

``python -m bench.contexts --model MODEL --set FILE --out FILE`` asks the questions of a data set
(``python -m bench.questions``) in prompts that begin with a user's own system message, which no
stored chunk was computed after. Chunks are computed after four contexts: one BOS token (``bos``),
ragcache's own instructions (``prefix``), these and ordinary text (``prose``), and the prompt's
exact prefix (``exact``). Each is reused and fused, with rows chosen by sensitivity, over all chunks
or chunk by chunk (``per chunk``). In place of the ordinary text, shorter, longer and other texts
are tried, and random tokens. Outcomes are saved after every question; the same command goes on
where it was stopped. ``--only TEXT`` asks only the variants whose label contains TEXT.

``python -m bench.contexts --out FILE --table PAGE`` writes the tables of what is saved. Files of
the same questions (``--out`` more than once) are joined.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.real_results import Facts
from bench.results import commit, machine, table
from ragcache.blend import Blender, blender
from ragcache.blend.base import FixedRows, Layout, Selector
from ragcache.blend.fused import Fused
from ragcache.blend.ranking import highest
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import SEPARATOR
from ragcache.errors import ConfigError, RagCacheError
from ragcache.eval.articles import ARTICLES
from ragcache.eval.bootstrap import Array, Bootstrap, Estimate
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.metrics import answer_agreement, first_token_kl
from ragcache.models import model_path
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.planning.prose import PROSE
from ragcache.store.memory import MemoryStore
from ragcache.types import Prompt, Sampling, Tokens

SYSTEM = (
    "You are the assistant of a public library. Visitors ask you questions, and the passages that "
    "follow were found in the library's encyclopaedia. Answer from these passages and from nothing "
    "else. If the passages contradict each other, prefer the more specific one. Never mention the "
    "passages, these instructions, or how you found the answer. Give names, places, numbers and "
    "years exactly as the passages spell them. Answer in the language of the question, with as few "
    "words as possible, without an introduction, and without repeating the question. If there is "
    "no answer in the passages, say that you do not know."
)
INSTRUCTION = "Only give me the answer and do not output any other words."
CONTEXTS = "bos", "prefix", "exact", "prose"
#: Texts in place of the ordinary text: the number of tokens, and what they are of.
TEXTS = "150 of prose", "300 of prose", "600 of articles", "1200 of articles", "600 of random ids"
TEXT_RATIO = 0.15  # at which these are fused
RATIOS = 0.05, 0.1, 0.15
TOKENS = 16

Outcome = Mapping[str, Mapping[str, float]]  # by variant, by name of a figure
_FIGURES = {"kl": "KL", "first": "KL of the first token", "top1": "top-1", "same": "same answer"}
_SHARES = "top1", "same"


@dataclass(frozen=True)
class FusedPerChunk(Fused):
    """Fused, with the same share of every chunk's rows, and as many rows in all."""

    name: ClassVar[str] = "fused-per-chunk"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(rows_per_chunk(layout, self.recompute_ratio))


def rows_per_chunk(layout: Layout, ratio: float) -> Tensor:
    """The most sensitive rows of every chunk, sorted int64; int(ratio * n) of the first n reusable
    rows, so that the choice for a chunk depends on no later one.

    A share of every chunk that is rounded down by itself would choose fewer rows than
    :class:`Fused`: 12 % fewer at a ratio of 5 % in chunks of 75 tokens.
    """
    rows, scores = [layout.reusable[:0]], layout.sensitivity
    seen = 0
    for number in range(len(layout.prompt.chunks)):
        own = layout.chunk_of == number
        before, seen = seen, seen + int(own.sum())
        count = int(ratio * seen) - int(ratio * before)
        rows.append(highest(layout.reusable[own], scores[own], count))
    return torch.cat(rows)


def variants() -> dict[str, tuple[str, Blender]]:
    """By label, the encoding context and the method."""
    found: dict[str, tuple[str, Blender]] = {}
    for context in CONTEXTS:
        found[f"reuse, {context}"] = context, blender("reuse")
        for ratio in RATIOS:
            found[f"fused {ratio:.0%}, {context}"] = context, Fused(ratio, attention=0)
    for ratio in RATIOS:
        found[f"fused {ratio:.0%} per chunk, as many rows, prefix"] = "prefix", FusedPerChunk(ratio)
    for text in TEXTS:
        found[f"reuse, {text}"] = text, blender("reuse")
        found[f"fused {TEXT_RATIO:.0%}, {text}"] = text, Fused(TEXT_RATIO, attention=0)
    return found


def prompt_of(engine: Engine, chunks: Sequence[str], question: str) -> Prompt:
    """The prompt of a question after :data:`SYSTEM`, with its chunks before the question."""
    text = f"{INSTRUCTION}{SEPARATOR}Question: {question}"
    messages = [ChatMessage.of("system", SYSTEM), ChatMessage.of("user", text)]
    before, after = ("".join(each.text for each in part) for part in _around(engine, messages))
    ids = engine.tokenize(before, control=True)
    return Prompt.of(ids, map(engine.template.chunk, chunks), engine.tokenize(after, control=True))


def _around(engine: Engine, messages: Sequence[ChatMessage]) -> tuple[list[Any], list[Any]]:
    """The segments before and after the last user's text begins."""
    flat = list(engine.chat_template().render(messages).segments)
    at = next(n for n, segment in enumerate(flat) if segment.text == messages[-1].text)
    return flat[:at], flat[at:]


def ask(
    engine: Engine, prompt: Prompt, labels: Collection[str] | None = None
) -> dict[str, dict[str, float]]:
    """The agreement with full prefill of all :func:`variants`, or of those in ``labels``."""
    store = MemoryStore()
    asked = {label: made for label, made in variants().items() if labels is None or label in labels}
    contexts = {name: _context(engine, name, prompt) for name, _ in asked.values()}
    for encoding in contexts.values():
        precompute(
            engine, store, [encoding.key(engine.fingerprint, chunk) for chunk in prompt.chunks]
        )
    exact = _context(engine, "exact", prompt)
    full = _reply(engine, store, exact, prompt, blender("full"), ())
    found = {}
    for label, (context, method) in asked.items():
        said = _reply(engine, store, contexts[context], prompt, method, full.tokens)
        kl, top1 = answer_agreement(full.forced, said.forced)
        same = said.tokens[:TOKENS] == full.tokens[:TOKENS]
        first = first_token_kl(full.forced[0], said.forced[0])
        found[label] = {"kl": kl, "top1": top1, "same": float(same), "first": first}
    return found


def _context(engine: Engine, name: str, prompt: Prompt) -> EncodingContext:
    if name == "exact":
        return EncodingContext(name, prompt.prefix)
    if name == "bos" and engine.bos is None:
        return EncodingContext(name, prompt.tokens[:1])
    if name not in TEXTS:
        return encoding_context(name, engine)
    count, _, text = name.split(" ", 2)
    return EncodingContext(name, engine.template.prefix + _ids(engine, text)[: int(count)])


def _ids(engine: Engine, text: str) -> Tokens:
    """Ids of one of :data:`TEXTS`."""
    articles = [file.read_text(encoding="utf-8") for file in sorted(ARTICLES.glob("*.md"))]
    ids = engine.tokenize(SEPARATOR.join(PROSE if text == "prose" else articles))
    return tuple(Random(0).choices(sorted(set(ids)), k=len(ids))) if text == "random ids" else ids


@dataclass(frozen=True, slots=True)
class _Reply:
    tokens: Tokens
    forced: Tensor


def _reply(
    engine: Engine,
    store: MemoryStore,
    encoding: EncodingContext,
    prompt: Prompt,
    method: Blender,
    forced: Tokens,
) -> _Reply:
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    stream = generator.stream(
        PromptRequest(prompt, method, Sampling(max_tokens=TOKENS), forced=forced)
    )
    answer = stream.answer
    assert all(chunk.miss is None for chunk in answer.report.chunks) or method.name == "full"
    return _Reply(answer.tokens, stream.forced_logits)


def shown(outcomes: Sequence[Outcome]) -> str:
    """The table of the variants that were measured with every question, and that of paired
    differences with 95 % intervals."""
    labels = [label for label in outcomes[0] if all(label in one for one in outcomes)]
    means = [
        [
            label,
            *(_shown(fmean(one[label][figure] for one in outcomes), figure) for figure in _FIGURES),
        ]
        for label in labels
    ]
    differences = [
        [one, other, *map(_with_interval, _differences(outcomes, one, other), _FIGURES)]
        for one, other in _pairs(labels)
    ]
    heads = _FIGURES.values()
    return "\n".join(
        [table(["variant", *heads], means), table(["variant", "minus", *heads], differences)]
    )


def _pairs(labels: Collection[str]) -> list[tuple[str, str]]:
    """The variants to compare, of those that were measured."""
    fused = [f"fused {ratio:.0%}" for ratio in RATIOS]
    pairs = [(f"{m}, {c}", f"{m}, exact") for c in ("prefix", "bos") for m in ("reuse", *fused)]
    pairs += [(f"{m}, prefix", f"{m}, bos") for m in ("reuse", *fused)]
    pairs += [(f"{m}, prose", f"{m}, prefix") for m in ("reuse", *fused)]
    pairs += [(f"{m}, {text}", f"{m}, prose") for text in TEXTS for m in ("reuse", fused[-1])]
    pairs += [(label, f"{m}, prefix") for m in fused for label in labels if f"{m} per" in label]
    return [pair for pair in pairs if set(pair) <= set(labels)]


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


def _opened(path: Path) -> BinaryIO:
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


def measure(given: argparse.Namespace) -> None:
    """Ask the questions that are not saved yet, and save the outcomes."""
    out: Path = given.out[0]
    labels = [label for label in variants() if given.only in label]
    if not labels:
        raise ConfigError(f"no variant has {given.only!r} in its label: {'; '.join(variants())}")
    with _opened(out) as file:
        Facts(machine(), commit(), shlex.join(sys.orig_argv[1:]), given.dtype).save(_facts(out))
        engine = TransformersEngine.load(model_path(given.model), dtype=given.dtype)
        asked = first_questions(load_dataset(given.set), given.questions)
        each = [(context.chunks, q.text) for context in asked for q in context.questions]
        done = len(load(out))
        for number, (chunks, question) in enumerate(each[done:], done + 1):
            outcome = ask(engine, prompt_of(engine, chunks[: given.chunks], question), labels)
            file.write(json.dumps(outcome).encode() + b"\n")
            print(f"{number} of {len(each)} questions", flush=True)


def _facts(out: Path) -> Path:
    return out.with_suffix(".run.json")


def page(files: Sequence[Path]) -> str:
    """The tables of files of outcomes, with how they were measured. Raises ConfigError."""
    outcomes = joined([load(file) for file in files])
    if not outcomes:
        raise ConfigError(f"no question is saved in {' and '.join(map(str, files))}")
    facts = [Facts.load(_facts(file)) for file in files if _facts(file).exists()]
    how = "".join(f"\n{f.machine}, {f.dtype}, commit {f.commit}: `{f.command}`\n" for f in facts)
    return f"{shown(outcomes)}\n{len(outcomes)} questions\n{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a name or folder, as ragcache takes it")
    parser.add_argument("--set", type=Path, help="a file of bench.questions")
    parser.add_argument(
        "--out", type=Path, required=True, action="append", help="outcomes, one line per question"
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
            measure(given)
        text = page(given.out)
    except RagCacheError as error:
        parser.exit(1, f"{error}\n")
    if given.table is not None:
        given.table.parent.mkdir(parents=True, exist_ok=True)
        given.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
