"""What answers lose at how few bytes: ``python -m bench.compression --model M --set FILE --out F``.

Every question of a data set (``python -m bench.questions``) is answered by ``fused`` at its default
ratio over KV that went through each codec, and compared with the same over unencoded KV: KL and
top-1 over its whole answer (teacher forcing), the share of the answers that are its own, and F1
with the right answers. Bytes and CPU times (one thread) are of the same chunks, without their
headers.

Outcomes are saved after every question; the same command goes on where it was stopped. ``python -m
bench.compression --out FILE --table PAGE`` writes the table of what is saved.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from bench.agreement import INSTRUCTION, Reply, load, opened, reply
from bench.real_results import Facts
from bench.results import commit, machine, table
from bench.rules import computed
from ragcache.blend import blender
from ragcache.core.fit_basis import codec_with_basis
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import RagCacheError
from ragcache.eval.bootstrap import Array, Bootstrap
from ragcache.eval.dataset import Question, first_questions, load_dataset
from ragcache.eval.metrics import f1, first_line
from ragcache.models import model_path
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.base import Miss
from ragcache.store.format.codecs import codec
from ragcache.store.format.codecs.kvtc import LEVELS
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import ChunkKV

METHOD = "fused"
CODECS = "bfloat16", "int8", "fp8", "cachegen"
HEADS = (
    *("codec", "bits per number", "of bfloat16", "encode MB/s", "decode MB/s"),
    *("KL", "top-1", "same", "F1", "KL from full"),
)
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a name or folder, as ragcache takes it")
    parser.add_argument("--set", type=Path, help="a file of bench.questions")
    parser.add_argument("--out", type=Path, required=True, help="outcomes, a line per question")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--minutes", type=float, help="stop after these; go on by the same command")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write the table of --out")
    given = parser.parse_args()
    if given.table is None and None in (given.model, given.set):
        parser.error("give --model and --set, or --table")
    try:
        if given.table is None:
            measure(given)
        text = page(given.out)
    except RagCacheError as error:
        parser.exit(1, f"{error}\n")
    if given.table is not None:
        given.table.write_text(text, encoding="utf-8")
    print(text)


def measure(given: argparse.Namespace) -> None:
    """Ask the questions that are not saved yet, and save the outcomes."""
    out, began = given.out, time.monotonic()
    with opened(out) as file, tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        facts = Facts(machine(), commit(), shlex.join(sys.orig_argv[1:]), given.dtype)
        facts.save(out.with_suffix(".run.json"))
        engine = TransformersEngine.load(model_path(given.model), dtype=given.dtype)
        names = [*CODECS, *(codec_with_basis(engine, level, Path(folder)) for level in LEVELS)]
        asked = first_questions(load_dataset(given.set), given.questions)
        each = [(context.chunks, one) for context in asked for one in context.questions]
        done = len(load(out))
        for number, (chunks, question) in enumerate(each[done:], done + 1):
            if given.minutes is not None and time.monotonic() - began > 60 * given.minutes:
                print("the time is up: go on by the same command", flush=True)
                break
            outcome = ask(engine, chunks, question, names)
            file.write(json.dumps(outcome).encode() + b"\n")
            print(f"{number} of {len(each)} questions", flush=True)


def ask(
    engine: Engine, chunks: Sequence[str], question: Question, names: Sequence[str]
) -> dict[str, Row]:
    """The outcome of every codec, and of unencoded KV."""
    prompt = engine.template.prompt(chunks, question.text, INSTRUCTION)
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    store, method = computed(engine, encoding, prompt), blender(METHOD)
    keys = {encoding.key(engine.fingerprint, chunk) for chunk in prompt.chunks}
    known = {key: kv for key in keys if not isinstance(kv := store.get(key), Miss)}
    prefix = ChunkKey(engine.fingerprint, prompt.prefix)
    full = reply(engine, store, encoding, prompt, blender("full"), ())
    raw = reply(engine, store, encoding, prompt, method, full.tokens)
    own = reply(engine, store, encoding, prompt, method, raw.tokens)

    def figures(said: Reply, as_raw: Reply) -> Row:
        text = first_line("".join(engine.pieces(said.tokens)))
        return {
            **as_raw.agreement(own),
            "f1": f1(text, question.answers),
            "full": said.agreement(full)["kl"],
        }

    found: dict[str, Row] = {"raw": figures(raw, own) | {"bits": 8.0 * engine.spec.itemsize}}
    for name in names:
        made, cost = MemoryStore(), {"bytes": 0.0, "numbers": 0.0, "encode": 0.0, "decode": 0.0}
        kept = store.get(prefix)
        assert not isinstance(kept, Miss)
        made.put(prefix, kept)
        for key, kv in known.items():
            made.put(key, through(name, kv, cost))
        said = reply(engine, made, encoding, prompt, method, full.tokens)
        as_raw = reply(engine, made, encoding, prompt, method, raw.tokens)
        found[name.partition(":")[0]] = figures(said, as_raw) | {
            "bits": 8 * cost["bytes"] / cost["numbers"],
            "encode": engine.spec.itemsize * cost["numbers"] / cost["encode"],
            "decode": engine.spec.itemsize * cost["numbers"] / cost["decode"],
        }
    return found


def through(name: str, kv: ChunkKV, cost: dict[str, float]) -> ChunkKV:
    """A chunk's KV after a codec; adds what it took to ``cost``: bytes, and seconds of CPU."""
    coded, times = codec(name), [time.process_time()]
    raws = list(coded.encode_layers(list(zip(kv.keys, kv.values, strict=True))))
    times.append(time.process_time())
    pairs = list(coded.decode_layers(raws, kv.spec, len(kv.tokens)))
    times.append(time.process_time())
    cost["bytes"] += sum(map(len, raws))
    cost["numbers"] += 2 * sum(keys.numel() for keys in kv.keys)
    cost["encode"] += times[1] - times[0]
    cost["decode"] += times[2] - times[1]
    return replace(kv, keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))


def page(out: Path) -> str:
    """The table of a file of outcomes, with how they were measured."""
    outcomes = load(out)
    rows = [_row(label, [one[label] for one in outcomes]) for label in outcomes[0]]
    facts = Facts.load(out.with_suffix(".run.json"))
    how = f"{facts.machine}, {facts.dtype}, commit {facts.commit}: `{facts.command}`"
    return f"{table(HEADS, rows)}\n{len(outcomes)} questions; {how}\n"


def _row(label: str, each: Sequence[Mapping[str, float]]) -> list[str]:
    def mean(figure: str) -> float:
        return fmean(one.get(figure, 0.0) for one in each)

    low, high = _interval([one["kl"] for one in each])
    rates = [f"{mean(f) / 1e6:,.0f}" if f in each[0] else "" for f in ("encode", "decode")]
    return [
        label,
        f"{mean('bits'):.2f}",
        f"1 / {16 / mean('bits'):.1f}",
        *rates,
        f"{mean('kl'):.4f} [{low:.4f}, {high:.4f}]",
        *(f"{mean(figure):.1%}" for figure in ("top1", "same", "f1")),
        f"{mean('full'):.3f}",
    ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 %, of the mean over questions."""
    found = Bootstrap(np.array([[1.0, value] for value in values])).estimate(_mean)[0]
    return found.interval or (found.value, found.value)


def _mean(sums: Array) -> Array:
    means: Array = sums[..., 1:] / sums[..., :1]
    return means


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
