"""Cache-Craft over a stream of requests: ``python -m bench.stream``.

500 questions over the shipped world's documents. A request has the document that it asks about and
seven more, in random order; all are drawn by Zipf's law, so that few documents are in most prompts.
For every hundred requests: the share that was recomputed, and the share of correct answers,
compared with full prefill of the same prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass, field
from statistics import mean

import torch

from ragcache.blend import blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.metrics import exact_match
from ragcache.models import TINY, model_path, world_file
from ragcache.planning.context import encoding_context
from ragcache.store.disk.store import DiskStore
from ragcache.types import Sampling

DOCUMENTS = 8  # in a prompt


@dataclass
class Block:
    """The results of a hundred requests."""

    charged: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    right_full: list[bool] = field(default_factory=list)

    def row(self, name: str) -> str:
        shares = (self.charged, self.missed, self.right, self.right_full)
        return " | ".join([name, *(f"{100 * mean(map(float, share)):.1f}" for share in shares)])


def requests(count: int, exponent: float, seed: int) -> list[tuple[list[str], str, list[str]]]:
    """(chunks, question, answers) of every request."""
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        texts = {d["id"]: d["text"].split("\n\n") for d in map(json.loads, lines)}
    with world_file("questions.jsonl").open(encoding="utf-8") as lines:
        asked = [q for q in map(json.loads, lines) if q["kind"] != "hop"]
    rng = random.Random(seed)
    names = rng.sample(list(texts), len(texts))
    weight = {name: 1 / (rank + 1) ** exponent for rank, name in enumerate(names)}
    made = []
    for _ in range(count):
        [question] = rng.choices(asked, [weight[q["document"]] for q in asked])
        chosen = {question["document"]}
        while len(chosen) < DOCUMENTS:
            chosen.update(rng.choices(names, list(weight.values())))
        order = rng.sample(sorted(chosen), DOCUMENTS)
        chunks = [chunk for name in order for chunk in texts[name]]
        made.append((chunks, question["question"], question["answers"]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--mode", default="cachecraft")
    given = parser.parse_args()
    engine = TransformersEngine.load(model_path(TINY))
    mode, full, sampling = blender(given.mode), blender("full"), Sampling(max_tokens=8)
    blocks: list[Block] = []
    with tempfile.TemporaryDirectory() as folder, DiskStore(folder) as store:
        answering = LocalGenerator(engine, store, encoding_context("prefix", engine))
        for number, (chunks, question, answers) in enumerate(
            requests(given.requests, given.exponent, seed=0)
        ):
            if number % 100 == 0:
                blocks.append(Block())
            prompt = engine.template.prompt(chunks, question)
            got = answering.stream(PromptRequest(prompt, mode, sampling)).answer
            want = answering.stream(PromptRequest(prompt, full, sampling)).answer
            block, missed = blocks[-1], [chunk.miss is not None for chunk in got.report.chunks]
            block.charged.append(got.report.charged_share)
            block.missed.append(sum(missed) / len(missed))
            block.right.append(exact_match(got.text, answers))
            block.right_full.append(exact_match(want.text, answers))
    print(f"`{mode.mode}`, {DOCUMENTS} documents a prompt, Zipf {given.exponent}; in percent\n")
    heads = (
        "requests",
        "recomputed, charged",
        "chunks without a variant",
        "correct",
        "correct in full",
    )
    print(f"| {' | '.join(heads)} |\n|---|--:|--:|--:|--:|")
    for at, block in enumerate(blocks):
        print(f"| {block.row(f'{100 * at + 1} to {100 * at + len(block.right)}')} |")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
