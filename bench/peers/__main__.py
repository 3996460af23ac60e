"""Measure ragcache beside other systems: ``python -m bench.peers --model smollm2``.

See docs/peers.md, which ``--page`` writes. ``python -m bench.peers.setup`` makes the environments.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from pydantic import TypeAdapter

from bench.peers.comparison import Measured, rows
from bench.peers.driver import default_pythons, measure
from bench.peers.page import command_line, page, results_table
from bench.peers.prompts import end_tokens, from_dataset, from_docs, load_template, workload
from bench.peers.protocol import Setup
from bench.peers.setup import ENVIRONMENTS
from bench.results import ROOT, commit, machine
from ragcache.models import SMOLLM2, model_path
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.gguf_header import is_gguf


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2, help="a folder, a GGUF file, or a name")
    parser.add_argument("--gguf", help="the same weights for llama.cpp; default: the model's file")
    parser.add_argument("--dataset", type=Path, help="prompts from a data set, not from docs/")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt, at most")
    parser.add_argument("--pool", type=int, default=24, help="chunks that prompts are made of")
    parser.add_argument("--answer", type=int, default=24, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", help="only these")
    parser.add_argument(
        "--python", action="append", default=[], metavar="SYSTEM=PATH", help="another interpreter"
    )
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers", help="results, logs")
    parser.add_argument("--page", type=Path, help="write this page, such as docs/peers.md")
    parser.add_argument("--note", default="", help="a sentence on the page about this run")
    given = parser.parse_args()
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)

    torch.set_num_threads(given.threads)
    named = model_path(given.model)
    gguf = given.gguf or (named if is_gguf(Path(named)) else "")
    checkpoint = Checkpoint.of(named)
    model = checkpoint.folder  # of safetensors, also for a GGUF file, which has been converted
    template, tokenizer = load_template(model)
    source = from_dataset(given.dataset) if given.dataset else from_docs(template)
    made = workload(source, template, count=given.prompts, tokens=given.tokens, pool=given.pool)
    pythons = default_pythons(given.environments)
    pythons |= dict(pair.split("=", 1) for pair in given.python)
    if given.systems:
        pythons = {name: pythons[name] for name in given.systems}
    setup = Setup(
        str(model),
        gguf,
        given.threads,
        given.answer,
        # kvboost's padding takes up to 127 tokens more per chunk.
        longest=2 * given.tokens + given.answer,
        prefix=list(made.prefix),
        pool=[list(chunk) for chunk in made.pool],
    )
    lengths = [len(asked.prompt) for asked in made.asked]
    about = (
        f"Model: {checkpoint.name}. Text: {made.text}. {len(lengths)} prompts of "
        f"{min(lengths):,} to {max(lengths):,} tokens over a pool of "
        f"{len(made.pool)} chunks, greedy answers of up to {given.answer} tokens, "
        f"{given.threads} threads."
    )
    if given.note:
        about += f"\n\n**{given.note}**"
    tell(about)
    measured = measure(pythons, setup, made, end_tokens(model), given.out, tell)
    found = rows(measured, lambda ids: str(tokenizer.decode(ids)))
    where = f"{machine()}; commit {commit()}; {time.monotonic() - began:.0f} s in all."
    command = command_line(sys.argv[1:])
    (given.out / "peers.json").write_bytes(
        TypeAdapter(list[Measured]).dump_json(measured, indent=1)
    )
    print(f"\n{where}\n\n{results_table(found)}", flush=True)
    for one in measured:
        if one.error:
            print(f"{one.system}: {one.error}")
    if given.page:
        given.page.write_text(page(where, command, about, measured, found), encoding="utf-8")
        print(f"wrote {given.page}")


if __name__ == "__main__":
    main()
