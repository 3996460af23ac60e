"""What misses=consistent costs: ``python -m bench.misses --model DIR``.

The first request of a prompt, when none of its chunks is stored, and the second, when all are: with
``misses=exact``, the first computes them in the prompt, and alone once it has answered; with
``consistent``, alone before it answers. Seconds are medians over rounds, in which both take turns.
``done s`` is until what was missing is stored.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import get_args

from bench.agent_context import Repository, paste
from bench.results import ROOT, commit, machine, table
from ragcache.core.request import Misses
from ragcache.eval.metrics import first_token_kl
from ragcache.rag import RagCache
from ragcache.settings import Settings

QUESTION = "Which function matters most in these files?"


@dataclass(frozen=True)
class Row:
    misses: Misses
    request: str
    tokens: int
    ttft_s: float
    done_s: float
    kl: float  # KL(the second's || this one's) of the first answer token, nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or GGUF file")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", default="", help="of the store")
    given = parser.parse_args()
    settings = Settings.load(model=given.model, codec=given.codec, ratio=0.15, max_tokens=1)
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        rows = measure(Path(folder), settings, given.tokens, given.rounds)
    print(f"{show(rows)}\n`python {shlex.join(sys.orig_argv[1:])}` on {machine()}; {commit()}.")


def measure(folder: Path, settings: Settings, tokens: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    with RagCache.open(folder / "first", settings=settings) as first:
        for number in range(rounds + 1):  # one to warm up
            chunks = texts(first, number, tokens)
            for misses in get_args(Misses):
                path = folder / f"{number}-{misses}"
                with RagCache.open(path, settings=settings, beside=first) as cache:
                    found = list(asked(cache, chunks, misses))
                rows += found if number else []
    return rows


def texts(cache: RagCache, number: int, tokens: int) -> list[str]:
    """Files of a repository of about so many tokens."""
    repository, chunks, length = Repository.at(ROOT), list[str](), 0
    for seed in count():
        text = paste(repository, Random(f"{number} {seed}")).text[:1000]
        length += len(cache.engine.tokenize(text))
        if length > tokens:
            break
        chunks.append(text)
    return chunks


def asked(cache: RagCache, chunks: Sequence[str], misses: Misses) -> Iterator[Row]:
    """The first request and the second."""
    found = []
    for request in ("first", "second"):
        began = time.perf_counter()
        stream = cache.stream(QUESTION, chunks=chunks, misses=misses)
        answer = stream.answer
        spent = time.perf_counter() - began
        found.append((request, answer, spent, stream.first_logits))
    last = found[-1][3]
    for request, answer, spent, logits in found:
        kl = first_token_kl(last, logits)
        yield Row(misses, request, len(answer.prompt), answer.report.ttft_s, spent, kl)


def show(rows: Sequence[Row]) -> str:
    cells = []
    for misses in get_args(Misses):
        for request in ("first", "second"):
            found = [row for row in rows if (row.misses, row.request) == (misses, request)]
            cells.append(
                [
                    f"{misses}, {request}",
                    f"{median(row.tokens for row in found):,.0f}",
                    f"{median(row.ttft_s for row in found):.2f}",
                    f"{median(row.done_s for row in found):.2f}",
                    f"{median(row.kl for row in found):.4f}",
                ]
            )
    return table(["misses, request", "tokens", "TTFT s", "done s", "KL from the second"], cells)


if __name__ == "__main__":
    main()
