"""Measure what it costs to compute chunks after a context that belongs to the model.

``python -m bench.contexts --model MODEL --set FILE --out FILE`` asks the questions of a data set
(``python -m bench.questions``) in prompts that begin with a user's own system message, which no
stored chunk was computed after. Chunks are computed after three contexts: one BOS token (``bos``),
ragcache's own instructions (``prefix``), and the prompt's exact prefix (``exact``). Each is reused
and fused, with rows chosen over all chunks, or chunk by chunk (``per chunk``). Outcomes are saved
after every question; the same command goes on where it was stopped. ``--table`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

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
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.metrics import answer_agreement, first_token_kl
from ragcache.models import model_path
from ragcache.planning.context import EncodingContext, encoding_context
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
CONTEXTS = "bos", "prefix", "exact"
TOKENS = 16


@dataclass(frozen=True)
class FusedPerChunk(Fused):
    """Fused, with the same share of every chunk's rows."""

    name: ClassVar[str] = "fused-per-chunk"

    def selector(self, layout: Layout, layers: int) -> Selector:
        rows, scores = [layout.reusable[:0]], layout.sensitivity
        for number in range(len(layout.prompt.chunks)):
            own = layout.chunk_of == number
            count = int(self.recompute_ratio * int(own.sum()))
            rows.append(highest(layout.reusable[own], scores[own], count))
        return FixedRows(torch.cat(rows).sort().values)


def variants() -> dict[str, tuple[str, Blender]]:
    """By label, the encoding context and the method."""
    found: dict[str, tuple[str, Blender]] = {}
    for context in CONTEXTS:
        found[f"reuse, {context}"] = context, blender("reuse")
        for ratio in (0.05, 0.1, 0.15):
            found[f"fused {ratio:.0%}, {context}"] = context, Fused(ratio)
    for ratio in (0.05, 0.1, 0.15):
        found[f"fused {ratio:.0%} per chunk, prefix"] = "prefix", FusedPerChunk(ratio)
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


def ask(engine: Engine, prompt: Prompt) -> dict[str, dict[str, float]]:
    """The agreement of every variant with full prefill."""
    store = MemoryStore()
    contexts = {"exact": EncodingContext("exact", prompt.prefix)}
    contexts |= {name: _context(engine, name, prompt) for name in ("bos", "prefix")}
    for encoding in contexts.values():
        precompute(
            engine, store, [encoding.key(engine.fingerprint, chunk) for chunk in prompt.chunks]
        )
    full = _reply(engine, store, contexts["exact"], prompt, blender("full"), ())
    found = {}
    for label, (context, method) in variants().items():
        said = _reply(engine, store, contexts[context], prompt, method, full.tokens)
        kl, top1 = answer_agreement(full.forced, said.forced)
        same = said.tokens[:TOKENS] == full.tokens[:TOKENS]
        first = first_token_kl(full.forced[0], said.forced[0])
        found[label] = {"kl": kl, "top1": top1, "same": float(same), "first": first}
    return found


def _context(engine: Engine, name: str, prompt: Prompt) -> EncodingContext:
    if name == "bos" and engine.bos is None:
        return EncodingContext(name, prompt.tokens[:1])
    return encoding_context(name, engine)


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


def shown(outcomes: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """The table of all variants, and paired differences with 95 % intervals (bootstrap)."""
    rows = [
        [
            label,
            f"{fmean(one[label]['kl'] for one in outcomes):.3f}",
            f"{fmean(one[label]['first'] for one in outcomes):.3f}",
            f"{fmean(one[label]['top1'] for one in outcomes):.0%}",
            f"{fmean(one[label]['same'] for one in outcomes):.0%}",
        ]
        for label in outcomes[0]
    ]
    pairs = [(f"{m}, {c}", f"{m}, exact") for m in _METHODS for c in ("prefix", "bos")]
    pairs += [
        (f"fused {share} per chunk, prefix", f"fused {share}, prefix")
        for share in ("5%", "10%", "15%")
    ]
    differences = []
    for one, other in pairs:
        deltas = [o[one]["kl"] - o[other]["kl"] for o in outcomes]
        low, high = _interval(deltas)
        differences.append([one, other, f"{fmean(deltas):+.3f} [{low:+.3f}, {high:+.3f}]"])
    heads = "variant", "KL", "KL of the first token", "top-1", "same answer"
    return "\n".join(
        [table(heads, rows), "", table(("variant", "against", "difference in KL"), differences)]
    )


_METHODS = "reuse", "fused 5%", "fused 10%", "fused 15%"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a name or folder, as ragcache takes it")
    parser.add_argument("--set", type=Path, help="a file of bench.questions")
    parser.add_argument("--out", type=Path, required=True, help="outcomes, one line per question")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--table", action="store_true", help="print the table of what is saved")
    given = parser.parse_args()
    done = [json.loads(line) for line in given.out.open()] if given.out.exists() else []
    if not given.table:
        if given.model is None or given.set is None:
            parser.error("give --model and --set, or --table")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        engine = TransformersEngine.load(model_path(given.model), dtype=given.dtype)
        asked = first_questions(load_dataset(given.set), given.questions)
        each = [(context.chunks, q.text) for context in asked for q in context.questions]
        for number, (chunks, question) in enumerate(each[len(done) :], len(done) + 1):
            done.append(ask(engine, prompt_of(engine, chunks, question)))
            with given.out.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(f"{number} of {len(each)} questions", flush=True)
    print(shown(done))
    print(f"\n{len(done)} questions; {machine()}; commit {commit()}")


if __name__ == "__main__":
    main()
