"""Greedy accuracy of the shipped model on the frozen prompts, by kind and by how chunks are reused.

A dense reference in float32, written to be checked against, not to be fast: every mode is one
forward pass in which chosen rows take their keys and values from the isolated chunks.

- full: plain prefill;
- reuse: every chunk's keys and values come from a prefill of prefix + chunk alone;
- cacheblend: layers 0 and 1 in full, then the share r of context tokens whose values differ most
  at layer 1 (`--check`) goes on being computed (Yao et al., 2024, single cut);
- random: as cacheblend, with random tokens.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .export import load_exported
from .model import Attention, Layer, TinyLlama, rotate
from .tokenizer import BOS, EOS, PREFIX, answer_text, chunk_text, question_text

Select = Callable[[Tensor], Tensor]  # value deviation (tokens,) -> rows to recompute, bool
Cache = list[tuple[Tensor, Tensor]]  # per layer: keys before RoPE, values; (kv heads, tokens, size)


class Reader:
    """Runs one context with one question at a time."""

    def __init__(self, model: TinyLlama, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefix = [BOS, *self.ids(PREFIX)]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = layer.self_attn.project(layer.input_layernorm(x)[None])
        return q[0], k[0], v[0]

    def finish(self, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        out: Tensor = x + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
        return out + layer.mlp(layer.post_attention_layernorm(out))  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, visible: Tensor) -> Tensor:
        """q (heads, n, size) at positions `at` over all keys; visible (n, keys)."""
        where = torch.arange(k.shape[1])
        cos, sin = self.model.rotation(torch.cat((where, at))[None], torch.float32)
        count = k.shape[1]
        k = rotate(k, (cos[0, :, :count], sin[0, :, :count]))
        q = rotate(q, (cos[0, :, count:], sin[0, :, count:]))
        repeat = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = (q @ k.transpose(1, 2)) * q.shape[2] ** -0.5
        weights: Tensor = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return weights @ v

    @torch.no_grad()
    def prefill(
        self,
        ids: list[int],
        cache: Cache | None = None,
        select: Select | None = None,
        check: int = 1,
    ) -> Cache:
        """Keys and values of a context. With a cache, rows not selected take theirs from it.

        Rows are selected at layer `check`; the layers up to it run in full.
        """
        x = self.model.embed_tokens(torch.tensor(ids))
        count, head = len(ids), len(self.prefix)
        active = torch.ones(count, dtype=torch.bool)
        built: Cache = []
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer) and isinstance(layer.self_attn, Attention)
            q, fresh_k, fresh_v = self.project(layer, x)
            k, v = fresh_k, fresh_v
            if cache is not None and (select is None or number > check):
                k, v = cache[number][0].clone(), cache[number][1].clone()
                k[:, active], v[:, active] = fresh_k, fresh_v
            built.append((k, v))
            if cache is not None and select is not None and number == check:
                deviation = (v - cache[number][1]).pow(2).sum((0, 2))[head:]
                active = torch.cat((torch.ones(head, dtype=torch.bool), select(deviation)))
                x, q = x[active], q[:, active]
            elif cache is not None and select is None and number == 0:
                active = torch.zeros(count, dtype=torch.bool)
                active[:head] = True
                x, q = x[active], q[:, active]
                built[0] = cache[0]
            at = active.nonzero()[:, 0]
            visible = torch.arange(count)[None] <= at[:, None]
            x = self.finish(layer, x, self.attend(q, k, v, at, visible))
        return built

    def isolated(self, chunks: list[list[int]]) -> Cache:
        """Prefix once, then every chunk behind the prefix alone."""
        head = len(self.prefix)
        parts = [self.prefill(self.prefix)]
        for chunk in chunks:
            alone = self.prefill(self.prefix + chunk)
            parts.append([(k[:, head:], v[:, head:]) for k, v in alone])
        return [
            (torch.cat([p[n][0] for p in parts], 1), torch.cat([p[n][1] for p in parts], 1))
            for n in range(len(self.model.layers))
        ]

    @torch.no_grad()
    def right(self, cache: Cache, question: str, answer: str) -> bool:
        """Whether greedy decoding behind the cache gives the answer and then stops."""
        asked = self.ids(question_text(question))
        wanted = [*self.ids(answer_text(answer)), EOS]
        ids = asked + wanted[:-1]
        start = cache[0][0].shape[1]
        at = start + torch.arange(len(ids))
        visible = torch.arange(start + len(ids))[None] <= at[:, None]
        x = self.model.embed_tokens(torch.tensor(ids))
        for (k, v), layer in zip(cache, self.model.layers, strict=True):
            assert isinstance(layer, Layer)
            q, new_k, new_v = self.project(layer, x)
            keys, values = torch.cat((k, new_k), 1), torch.cat((v, new_v), 1)
            x = self.finish(layer, x, self.attend(q, keys, values, at, visible))
        hidden = self.model.norm(x)[len(asked) - 1 :]
        return bool((self.model.logits(hidden).argmax(-1) == torch.tensor(wanted)).all())


def top(share: float) -> Select:
    def select(deviation: Tensor) -> Tensor:
        chosen = torch.zeros(len(deviation), dtype=torch.bool)
        chosen[deviation.topk(max(1, int(share * len(deviation)))).indices] = True
        return chosen

    return select


def shuffled(share: float, seed: int) -> Select:
    generator = torch.Generator().manual_seed(seed)

    def select(deviation: Tensor) -> Tensor:
        return top(share)(torch.rand(len(deviation), generator=generator))

    return select


def measure(
    reader: Reader, lines: Iterable[str], share: float, check: int
) -> dict[str, dict[str, list[bool]]]:
    """Verdicts by mode and kind."""
    found: dict[str, dict[str, list[bool]]] = {}
    for number, line in enumerate(lines):
        prompt = json.loads(line)
        chunks = [reader.ids(chunk_text(chunk)) for chunk in prompt["chunks"]]
        ids = reader.prefix + [token for chunk in chunks for token in chunk]
        cache = reader.isolated(chunks)
        modes = {
            "full": reader.prefill(ids),
            "reuse": cache,
            "cacheblend": reader.prefill(ids, cache, top(share), check),
            "random": reader.prefill(ids, cache, shuffled(share, number), check),
        }
        for mode, built in modes.items():
            for item in prompt["questions"]:
                ok = reader.right(built, item["question"], item["answers"][0])
                found.setdefault(mode, {}).setdefault(item["kind"], []).append(ok)
    return found


def show(
    folder: Path, prompts: str, contexts: int = 0, share: float = 0.15, check: int = 1
) -> None:
    """Print the table for the first `contexts` lines of a file of prompts (0: for all)."""
    started = time.monotonic()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader = Reader(load_exported(folder), tokenizer)
    lines = (folder / "world" / prompts).read_text().splitlines()
    lines = lines[: contexts or None]
    found = measure(reader, lines, share, check)
    kinds = list(found["full"])
    print(f"| {prompts}, {len(lines)} contexts |", " | ".join(kinds), "|")
    print("|---" * (len(kinds) + 1) + "|")
    for mode, verdicts in found.items():
        cells = [f"{100 * sum(v) / len(v):.1f}" for v in (verdicts[k] for k in kinds)]
        print(f"| {mode} |", " | ".join(cells), "|")
    counts = " ".join(f"{k}={len(found['full'][k])}" for k in kinds)
    print(f"questions: {counts}; {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ragcache/models/tiny"))
    parser.add_argument("--prompts", default="prompts.jsonl")
    parser.add_argument("--contexts", type=int, default=0, help="0 for all")
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--check", type=int, default=1, help="the layer that selects")
    given = parser.parse_args()
    torch.set_num_threads(1)
    show(given.folder, given.prompts, given.contexts, given.share, given.check)


if __name__ == "__main__":
    main()
