"""Measure what storing fewer rows of a chunk costs: ``python -m bench.dropping --model smollm2
--set SETS/hotpotqa-split.jsonl --out FILE``.

Rows are dropped when a chunk is stored, before any question is known, in every layer and head those
of the lowest score:

- *random*;
- *key norm*: rows with small keys are kept (Devoto et al., arXiv:2406.11430);
- *attention*: what a row receives, on average, from the later rows of its chunk (H2O,
  arXiv:2306.14048);
- *reconstruction*: the most that it receives while the chunk is repeated (KVzip, arXiv:2505.23416).

Chunks are reused as they are. The question and full prefill's answer attend to the rows that are
kept, at their positions, and what they predict is compared with full prefill. Beside them are all
rows in codecs that take as few bytes. For models that rotate keys as Llama does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.agreement import INSTRUCTION, TOKENS, Benchmark, Outcome, Reply
from ragcache.core.fit_basis import codec_with_basis
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.format.record import as_stored
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV, Tokens

ALL = "all rows"
SCORES = "random", "key norm", "attention", "reconstruction"
SHARES = 0.75, 0.5, 0.25
CODECS = "kvtc8", "kvtc16", "kvtc20"
BOTH = "kvtc8, 0.5 by attention"  # as many bytes as kvtc16
REPEAT = "\n\nRepeat the previous text:\n\n"

Planes = list[tuple[Tensor, Tensor]]  # of every layer: keys with RoPE, and values


def labels() -> list[str]:
    dropped = [f"{share} by {score}" for score in SCORES for share in SHARES]
    return [ALL, *dropped, *CODECS, BOTH]


def pairs(found: Collection[str]) -> list[tuple[str, str]]:
    return [(label, ALL) for label in found if label != ALL]


@torch.inference_mode()
def ask(engine: Engine, chunks: Sequence[str], question: str, wanted: Collection[str]) -> Outcome:
    """The outcome of every variant, by its label."""
    assert isinstance(engine, TransformersEngine)
    model = _Model(engine)
    prompt = engine.template.prompt(chunks, question, INSTRUCTION)
    full = model.full(prompt.tokens)
    known = engine.encode(
        list(prompt.chunks), context=encoding_context(DEFAULT_CONTEXT, engine).context
    )
    scores = [model.scores(kv) for kv in known]
    prefix = engine.encode([prompt.prefix])[0]
    tail = prompt.tokens[len(prompt.prefix) + sum(map(len, prompt.chunks)) :] + full.tokens[:-1]
    found: dict[str, dict[str, float]] = {}
    for label in wanted:
        stored, kept = known, None
        if label.startswith("kvtc"):
            name = _with_basis(engine, label.partition(",")[0])
            stored = [_coded(engine, name, kv) for kv in known]
        if " by " in label:
            share, _, score = label.removeprefix("kvtc8, ").partition(" by ")
            kept = [_highest(one[score], float(share)) for one in scores]
        forced = model.continued(prefix, stored, kept, tail)[1 - len(full.tokens) - 1 :]
        found[label] = Reply(tuple(forced.argmax(-1).tolist()), forced).agreement(full)
    return found


class _Model:
    """The model itself, with attention that shows its weights."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.model = engine, engine.model
        self.model.set_attn_implementation("eager")
        self.repeat = tuple(engine.tokenize(REPEAT))

    def full(self, tokens: Tokens) -> Reply:
        """Full prefill's greedy answer, and the logits that it was chosen from."""
        ids = torch.tensor([tokens])
        answer = self.model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, len(tokens) :]
        whole = torch.cat([ids[0], answer[:-1]])[None]
        return Reply(tuple(answer.tolist()), self.model(whole).logits[0, len(tokens) - 1 :])

    def scores(self, kv: ChunkKV) -> dict[str, Tensor]:
        """The score of every row, (layers, kv_heads, tokens) each."""
        before = encoding_context(DEFAULT_CONTEXT, self.engine).before(kv.tokens)
        first, count, heads = len(before), len(kv.tokens), self.engine.spec.kv_heads
        ids = torch.tensor([[*before, *kv.tokens, *self.repeat, *kv.tokens]])
        weights = self.model(ids, output_attentions=True, use_cache=False).attentions
        own = torch.stack([one[0, :, first:, first : first + count] for one in weights])
        own = own.view(len(own), heads, -1, *own.shape[2:])  # by KV head and head of it
        later = torch.arange(count, 0, -1)
        generator = torch.Generator().manual_seed(count)
        return {
            "random": torch.rand(len(weights), heads, count, generator=generator),
            "key norm": -torch.stack([keys.float().norm(dim=-1) for keys in kv.keys]),
            "attention": own[:, :, :, :count].sum(3).mean(2) / later,
            "reconstruction": own[:, :, :, count:].amax((2, 3)),
        }

    def continued(
        self,
        prefix: ChunkKV,
        chunks: Sequence[ChunkKV],
        kept: Sequence[Tensor] | None,
        tail: Tokens,
    ) -> Tensor:
        """Logits (tokens, vocabulary) of ``tail`` behind the rows that are ``kept``."""
        parts, at = [self._placed(prefix, 0)], len(prefix.tokens)
        for number, chunk in enumerate(chunks):
            placed = self._placed(chunk, at)
            parts.append(placed if kept is None else list(_only(placed, kept[number])))
            at += len(chunk.tokens)
        past: Any = DynamicCache()
        for layer, planes in enumerate(zip(*parts, strict=True)):
            keys, values = (torch.cat(rows, 1)[None] for rows in zip(*planes, strict=True))
            past.update(keys, values, layer)
        logits = []
        for position, token in enumerate(tail, at):  # one by one: no row is hidden by a mask
            ids, positions = torch.tensor([[token]]), torch.tensor([[position]])
            out = self.model(ids, past_key_values=past, position_ids=positions, use_cache=True)
            logits.append(out.logits[0, -1])
        return torch.stack(logits)

    def _placed(self, kv: ChunkKV, at: int) -> Planes:
        positions = torch.arange(at, at + len(kv.tokens))[None]
        turned = []
        for keys, values in zip(kv.keys, kv.values, strict=True):
            cos, sin = self.model.model.rotary_emb(keys[None].float(), positions)
            _, rotated = apply_rotary_pos_emb(keys[None].float(), keys[None].float(), cos, sin)
            turned.append((rotated[0], values.float()))
        return turned


def _only(planes: Planes, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for (keys, values), rows in zip(planes, kept, strict=True):
        index = rows[..., None].expand(-1, -1, keys.shape[-1])
        yield keys.gather(1, index), values.gather(1, index)


def _highest(scores: Tensor, share: float) -> Tensor:
    """The rows of the highest scores of each layer and head, in order."""
    count = max(1, round(share * scores.shape[-1]))
    return scores.topk(count, dim=-1).indices.sort(-1).values


def _coded(engine: TransformersEngine, name: str, kv: ChunkKV) -> ChunkKV:
    return as_stored(ChunkKey(engine.fingerprint.with_codec(name), kv.tokens), replace(kv))


@cache
def _with_basis(engine: TransformersEngine, level: str) -> str:
    folder = tempfile.mkdtemp(prefix="ragcache-")
    return codec_with_basis(engine, level, Path(folder))


if __name__ == "__main__":
    Benchmark(
        __doc__,
        labels,
        ask,
        pairs,
        note="Compared with full prefill; *same answer*: all tokens that it would choose are.",
    ).main()
