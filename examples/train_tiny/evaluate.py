"""Greedy accuracy by kind on held-out prompts, for full prefill and for isolated chunks."""

import itertools
import random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .batch import Batch, collate
from .model import Rows, TinyLlama
from .world import BINDINGS, Shape, World

BLOCKS = 4  # of the context: each attends to the keys up to its own end
EVALUATION_SEED = 20_000_000  # training draws from small seeds and from training names only


def rows_of(model: TinyLlama, batch: Batch) -> Rows:
    """Masks as additive biases, one per KV head and query head of it, and RoPE's angles."""
    dtype = model.precision
    heads, share = model.config.kv_heads, model.config.heads // model.config.kv_heads

    def bias(mask: Tensor) -> Tensor:  # (b, groups, n, keys) -> (b * heads * groups, share * n, ..)
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -1e9)
        return added[:, None].repeat(1, heads, 1, share, 1).flatten(0, 2)

    context = batch.context_mask().expand(len(batch.ids), -1, -1)[:, None]
    ends = [round(batch.context * i / BLOCKS) for i in range(BLOCKS + 1)]
    biases = [bias(context[:, :, a:b, :b]) for a, b in itertools.pairwise(ends)]
    asked = bias(batch.question_mask())
    return Rows(biases, asked, model.rotation(batch.positions, dtype), batch.context, batch.group)


@torch.no_grad()
def correct(model: TinyLlama, batch: Batch) -> dict[str, list[bool]]:
    """Per kind, whether every answer token (and the end) is the most likely one.

    With the right tokens before it, that is the case exactly when greedy decoding is right.
    """
    batch = batch.to(model.inverse.device)
    with model.autocast():
        hidden = model(batch.ids, rows_of(model, batch))[:, batch.context :]
        labelled = batch.targets >= 0
        right = model.logits(hidden[labelled]).argmax(-1) == batch.targets[labelled]
    rows = labelled.nonzero()[:, 0]
    verdicts: dict[tuple[int, int], tuple[str, bool]] = {}
    for row, question, kind, ok in zip(
        rows.tolist(),
        batch.question[labelled].tolist(),
        batch.kinds[labelled].tolist(),
        right.tolist(),
        strict=True,
    ):
        before = verdicts.get((row, question), ("", True))[1]
        verdicts[row, question] = (BINDINGS[kind], before and ok)
    found: dict[str, list[bool]] = {binding: [] for binding in BINDINGS}
    for binding, ok in verdicts.values():
        found[binding].append(ok)
    return found


def accuracy(
    model: TinyLlama,
    tokenizer: Tokenizer,
    shape: Shape,
    prompts: int = 24,
    isolated: bool = False,
    held_out: bool = True,
    size: int = 4,
) -> dict[str, float]:
    """Share of right answers per kind over `prompts` prompts (always the same ones)."""
    world = World("held_out" if held_out else "train")
    rng = random.Random(EVALUATION_SEED)
    totals: dict[str, list[bool]] = {binding: [] for binding in BINDINGS}
    for _ in range(0, prompts, size):
        batch = collate(tokenizer, [world.prompt(rng, shape, 24) for _ in range(size)], isolated)
        for binding, verdicts in correct(model, batch).items():
            totals[binding] += verdicts
    return {b: round(sum(v) / len(v), 3) for b, v in totals.items() if v}
