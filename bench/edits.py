"""Any edit of an agent's context: ``python -m bench.edits --model DIR --out DIR``.

A context of a repository's own files and of what commands print about it (bench/agent_context.py)
is edited step by step: a message or file is dropped, inserted or moved, a line is changed or
inserted, a turn is appended. Every version is sent as chat messages, unmodified, and answered by
``fused``; every ``--full-every``-th step also by full prefill. A step is saved as a line of JSON as
soon as it is measured; the same command goes on where it was stopped.

TTFT is from the call to the first token: rendering, tokenising and finding chunks count, for full
prefill too. Tokens count as reused if their KV was loaded. Agreement is over full prefill's answer,
by teacher forcing: the share of tokens at which both have the same most likely one. With several
ratios, the first is measured at every step, and the others at those with full prefill.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from statistics import fmean, median

from pydantic import TypeAdapter
from torch import Tensor

from bench.agent_context import (
    EDITS,
    QUESTION,
    SYSTEM,
    TASK,
    Context,
    Repository,
    edited,
    initial_context,
    messages,
)
from bench.real_results import Facts
from bench.results import ROOT, commit, machine, table
from ragcache.core.generate import LocalGenerator
from ragcache.core.request import Request
from ragcache.eval.metrics import answer_agreement
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import Report, Sampling, Tokens

RATIOS = (0.15,)
MAX_TOKENS = 16
_LEAST = 0.88  # of the most tokens: contexts do not get shorter


@dataclass(frozen=True)
class Agreement:
    """An answer compared with that of full prefill."""

    kl: float  # KL(full || fused), mean over the tokens of full prefill's answer, nats
    top1: float  # share of those tokens at which both have the same most likely one
    identical: int  # first tokens of the answer that are those of full prefill


@dataclass(frozen=True)
class Fused:
    """One answer by ``fused``. Tokens are those of the prompt."""

    ratio: float
    ttft_s: float
    loaded: int  # tokens whose KV was loaded
    recomputed: int  # of them, tokens that were recomputed
    missed: int  # tokens of chunks that were not stored
    texts: int  # tokens of texts that were computed: before, between and after chunks
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Step:
    """What was edited, and what the answers to the edited context took."""

    step: int  # 0: before the first edit, when nothing is stored
    kind: str
    what: str
    tokens: int  # of the prompt
    chunks: int
    fused: tuple[Fused, ...]
    full_s: float | None = None  # TTFT of full prefill
    answer: str = ""  # of full prefill


@dataclass(frozen=True)
class _Reply:
    tokens: Tokens
    text: str
    prompt: int
    report: Report
    ttft_s: float
    logits: Tensor | None
    keep: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and store")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=7800, help="most tokens of a prompt")
    parser.add_argument("--ratio", type=float, action="append", help="default: .15")
    parser.add_argument("--full-every", type=int, default=10, help="0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="HEAD", help="whose files the context is made of")
    parser.add_argument("--codec", default="", help="of the store")
    parser.add_argument("--misses", choices=("exact", "consistent"), default="exact")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of what is there"
    )
    given = parser.parse_args()
    path, facts = given.out / "edits.jsonl", given.out / "run.json"
    if not given.table:
        given.out.mkdir(parents=True, exist_ok=True)
        ran = Facts(machine(), commit(), shlex.join(sys.orig_argv[1:]), "")
        ran.save(facts)
        measure(given, path)
    found = load(path)
    ran = Facts.load(facts)
    print(f"\n{summary(found)}\n`python {ran.command}` on {ran.machine}; commit {ran.commit}.")


def measure(given: argparse.Namespace, path: Path) -> None:
    """Edit and answer, from the first step that is not saved on."""
    settings = Settings.load(model=given.model, codec=given.codec, misses=given.misses)
    done = load(path)
    ratios = given.ratio or RATIOS
    with RagCache.open(given.out / "store", settings=settings) as cache:
        need, have = given.tokens + MAX_TOKENS, cache.engine.context_tokens
        if need > have:
            raise SystemExit(f"{need} tokens do not fit {cache.engine.name}'s context of {have}")
        repository = Repository.at(ROOT, given.commit)
        every = contexts(repository, given.seed, given.steps, counter(cache), given.tokens)
        for step, (context, kind, what) in enumerate(every):
            if step < len(done):
                continue
            full = bool(given.full_every) and not step % given.full_every
            found = answered(cache, context, ratios if full or not step else ratios[:1], full)
            one = replace(found, step=step, kind=kind, what=what)
            with path.open("ab") as out:
                out.write(TypeAdapter(Step).dump_json(one) + b"\n")
            print(line(one), flush=True)


def contexts(
    repository: Repository, seed: int, steps: int, count: Callable[[Context], int], most: int
) -> Iterator[tuple[Context, str, str]]:
    """The first context, and those after each edit, with the kind of the edit and what it was."""
    context = initial_context(repository, Random(f"{seed}"), count, most)
    yield context, "first", "nothing is stored"
    for step in range(1, steps + 1):
        random = Random(f"{seed} {step}")
        least = round(_LEAST * most)
        context, kind, what = edited(context, repository, random, count, least, most)
        yield context, kind, what


def counter(cache: RagCache) -> Callable[[Context], int]:
    """Counts the tokens of a context's prompt, within a few per message."""

    @lru_cache(maxsize=10_000)
    def tokens(text: str) -> int:
        return len(cache.engine.tokenize(text))

    around = 8  # tokens of a chat template around a message
    fixed = sum(map(tokens, (SYSTEM, TASK, QUESTION))) + 4 * around

    def count(context: Context) -> int:
        return fixed + sum(tokens(b.text) + tokens(b.said) + 2 * around for b in context)

    return count


def answered(cache: RagCache, context: Context, ratios: Sequence[float], full: bool) -> Step:
    """The answers to a context. What was missing is stored after the last one, so that all ratios
    find the same."""
    chat = messages(context)
    reference = _reply(cache, Request(messages=chat, mode="full"), ()) if full else None
    forced = None if reference is None else reference.tokens
    replies = [
        _reply(cache, Request(messages=chat, mode="fused", ratio=ratio), forced) for ratio in ratios
    ]
    replies[-1].keep()
    first = replies[0]
    return Step(
        step=0,
        kind="",
        what="",
        tokens=first.prompt,
        chunks=len(first.report.chunks),
        fused=tuple(
            _fused(ratio, reply, reference) for ratio, reply in zip(ratios, replies, strict=True)
        ),
        full_s=None if reference is None else reference.ttft_s,
        answer="" if reference is None else reference.text,
    )


def _reply(cache: RagCache, request: Request, forced: Tokens | None) -> _Reply:
    began = time.perf_counter()
    sampling = Sampling(max_tokens=MAX_TOKENS)
    asked = cache.generate(replace(request, sampling=sampling, keep=False)).request
    assert isinstance(cache.generator, LocalGenerator)
    stream = cache.generator.stream(replace(asked, forced=forced))
    prepared = time.perf_counter() - began
    answer = stream.answer
    return _Reply(
        answer.tokens,
        answer.text,
        len(answer.prompt),
        answer.report,
        prepared + answer.report.ttft_s,
        None if forced is None else stream.forced_logits,
        stream.keep,
    )


def _fused(ratio: float, reply: _Reply, full: _Reply | None) -> Fused:
    report = reply.report
    loaded = report.reused_tokens + report.recomputed_tokens
    return Fused(
        ratio=ratio,
        ttft_s=reply.ttft_s,
        loaded=loaded + report.loaded_text_tokens,
        recomputed=report.recomputed_tokens,
        missed=report.chunk_tokens - loaded,
        texts=reply.prompt - report.chunk_tokens - report.loaded_text_tokens,
        agreement=None if full is None else agreement(full, reply),
    )


def agreement(full: _Reply, fused: _Reply) -> Agreement:
    """Compare an answer and its logits with those of full prefill."""
    assert full.logits is not None and fused.logits is not None
    kl, top1 = answer_agreement(full.logits, fused.logits)
    return Agreement(kl, top1, identical(full.tokens, fused.tokens))


def identical(full: Tokens, fused: Tokens) -> int:
    """The number of first tokens that are equal."""
    pairs = enumerate(zip(full, fused, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(full), len(fused)))


def load(path: Path) -> list[Step]:
    """The saved steps. A line that was not written to its end is left out."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        raw = raw[: raw.rfind(b"\n") + 1]
        path.write_bytes(raw)
    return [TypeAdapter(Step).validate_json(each) for each in raw.splitlines()]


def line(one: Step) -> str:
    """A step as it is printed."""
    first = one.fused[0]
    kept = first.loaded - first.recomputed
    shown = (
        f"{one.step:3d} {one.kind:11s} {one.tokens:5d} tokens, {first.loaded:5d} loaded "
        f"({first.loaded / one.tokens:4.0%}), {kept:5d} not recomputed; missed {first.missed}, "
        f"texts {first.texts}; TTFT {first.ttft_s:.1f} s"
    )
    if one.full_s is not None:
        shown += f", full {one.full_s:.1f} s ({one.full_s / first.ttft_s:.1f}x)"
    for each in one.fused:
        if each.agreement is not None:
            same = each.agreement
            shown += f"; r={each.ratio:g}: top-1 {same.top1:.0%}, {same.identical} identical, "
            shown += f"KL {same.kl:.3f}"
    return f"{shown} | {one.what}"


def summary(steps: Sequence[Step]) -> str:
    """Tables by ratio and by kind of edit, of the steps after the first."""
    after = [one for one in steps if one.step]
    if not after:
        return "no edits are measured yet\n"
    tokens = [one.tokens for one in after]
    head = f"{len(after)} edits of prompts of {min(tokens):,} to {max(tokens):,} tokens.\n"
    return "\n".join([head, _by_ratio(after), _by_kind(after)])


def _by_ratio(steps: Sequence[Step]) -> str:
    rows = []
    for ratio in sorted({each.ratio for one in steps for each in one.fused}):
        found = [(one, each) for one in steps for each in one.fused if each.ratio == ratio]
        compared = [each.agreement for _, each in found if each.agreement is not None]
        sooner = [one.full_s / each.ttft_s for one, each in found if one.full_s is not None]
        cells = [
            f"{ratio:g}",
            str(len(found)),
            f"{median(each.loaded / one.tokens for one, each in found):.1%}",
            f"{median((each.loaded - each.recomputed) / one.tokens for one, each in found):.1%}",
            f"{median(each.ttft_s for _, each in found):.1f}",
            f"{median(sooner):.1f}" if sooner else "",
        ]
        if compared:
            cells += [
                str(len(compared)),
                f"{fmean(each.top1 for each in compared):.1%}",
                f"{fmean(each.identical for each in compared):.1f}",
                f"{median(each.kl for each in compared):.4f}",
            ]
        rows.append(cells + [""] * (10 - len(cells)))
    heads = ["ratio", "edits", "reused", "not recomputed", "TTFT s", "full / TTFT"]
    return table([*heads, "compared", "top-1", "identical of 16", "median KL"], rows)


def _by_kind(steps: Sequence[Step]) -> str:
    rows = []
    for kind in EDITS:
        found = [one for one in steps if one.kind == kind]
        if found:
            shares = sorted(one.fused[0].loaded / one.tokens for one in found)
            rows.append(
                [
                    kind,
                    str(len(found)),
                    f"{median(shares):.1%}",
                    f"{shares[0]:.1%}",
                    f"{median(one.fused[0].missed for one in found):.0f}",
                    f"{median(one.fused[0].texts for one in found):.0f}",
                    f"{median(one.fused[0].ttft_s for one in found):.1f}",
                ]
            )
    heads = ["edit", "steps", "reused", "least", "tokens missed", "tokens of texts", "TTFT s"]
    return table(heads, rows)


if __name__ == "__main__":
    main()
