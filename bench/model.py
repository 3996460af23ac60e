"""The engine compared with its model's own forward and ``generate``: ``python -m bench.model``.

Full prefill by the engine and by the bare model with SDPA and logits of the last row only; then
greedy decoding after that prompt, by the engine and by the model's ``generate`` with its own cache.
The two take turns; times are medians over rounds, and ratios the medians of those within a round.
Both must give the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench import results
from bench.shapes import engine, prompt
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.types import Sampling, Tokens

TOKENS = 512, 4096
DTYPES = "float32", "bfloat16"


@dataclass(frozen=True)
class Row:
    """Seconds, and the model's over the engine's."""

    context: int
    dtype: str
    prefill_s: float
    own_prefill_s: float
    prefill_ratio: float
    token_s: float
    own_token_s: float
    token_ratio: float


def measure(
    contexts: Sequence[int] = TOKENS,
    *,
    answer: int = 64,
    rounds: int = 5,
    dtypes: Sequence[str] = DTYPES,
    shape: str = "llama-110m",
    device: str = "cpu",
) -> list[Row]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    given = [prompt(tokens, generator).tokens for tokens in contexts]
    for dtype in dtypes:
        model = engine(getattr(torch, dtype), shape, device)
        model.model.generation_config.eos_token_id = None
        rows += [row(model, ids, answer, rounds) for ids in given]
    return rows


def row(model: TransformersEngine, ids: Tokens, answer: int, rounds: int) -> Row:
    times, tokens = [], set()
    for _ in range(rounds + 1):  # one to warm up
        own, own_each, own_tokens = theirs(model, ids, answer)
        ours, each, our_tokens = mine(model, ids, answer)
        times.append((ours, own, own / ours, each, own_each, own_each / each))
        tokens |= {own_tokens, our_tokens}
    assert len(tokens) == 1, "the engine and generate give different tokens"
    columns = [median(column) for column in zip(*times[1:], strict=True)]
    return Row(len(ids), model.spec.dtype, *columns)


def mine(model: TransformersEngine, ids: Tokens, answer: int) -> tuple[float, float, Tokens]:
    """Seconds of prefill and of a decoded token, and the tokens, but for the first one."""
    began = time.perf_counter()
    prefilled = model.prefill(ids, room=answer + 1)
    prefilled.logits.cpu()
    filled = time.perf_counter()
    steps = model.decode(prefilled, Sampling(max_tokens=answer + 1))
    tokens = tuple(step.token for step in steps)
    return filled - began, (time.perf_counter() - filled) / answer, tokens[1:]


@torch.inference_mode()
def theirs(model: TransformersEngine, ids: Tokens, answer: int) -> tuple[float, float, Tokens]:
    """The same by the model alone."""
    bare: Any = model.model
    asked = torch.tensor([ids], device=model.device)
    began = time.perf_counter()
    cache = DynamicCache(config=bare.config)
    logits: Tensor = bare(asked, past_key_values=cache, logits_to_keep=1).logits
    first = logits[:, -1].float().argmax(-1, keepdim=True)
    first.cpu()
    filled = time.perf_counter()
    so_far = torch.cat([asked, first], 1)
    whole = bare.generate(
        so_far,
        attention_mask=torch.ones_like(so_far),
        past_key_values=cache,
        max_new_tokens=answer,
        do_sample=False,
    )
    spent = time.perf_counter() - filled
    return filled - began, spent / answer, tuple(whole[0, so_far.shape[1] :].tolist())


def table(found: Sequence[Row]) -> str:
    heads = ["context", "dtype", "prefill ms", "the model's", "ratio"]
    heads += ["a token ms", "generate's", "ratio"]
    rows = []
    for one in found:
        prefill = f"{1e3 * one.prefill_s:,.0f}", f"{1e3 * one.own_prefill_s:,.0f}"
        token = f"{1e3 * one.token_s:.1f}", f"{1e3 * one.own_token_s:.1f}"
        cells = [f"{one.context:,}", one.dtype, *prefill, f"{one.prefill_ratio:.3f}"]
        rows.append([*cells, *token, f"{one.token_ratio:.3f}"])
    return results.table(heads, rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--shape", default="llama-110m")
    parser.add_argument("--device", default="cpu")
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("model", found, table(found), out)


if __name__ == "__main__":
    main()
