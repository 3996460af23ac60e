"""Chunks of unlike length in one forward: ``python -m bench.packing``.

Tokens of chunks per second, for everything that precompute computes: their KV after a prefix, and
again after that and the passage that measures sensitivity. The package's packing is compared with
one row under a block-diagonal mask, with batches padded on the right, of chunks sorted by length or
not, and with one chunk at a time. The model has about 110M parameters, in float32, and ids are
random. There are two sets of lengths: paragraphs of the shipped world, and lognormal ones limited
to 32..512. Methods take turns, and a rate is the median over rounds; all methods are checked to
give the same values before timing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor

from bench import results
from bench.shapes import engine
from ragcache.core.sensitivity import measure_sensitivity
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.layer_hooks import CaptureKV, copy_to_host
from ragcache.engine.hf.packing import PackedForward
from ragcache.engine.hf.rope import record_rotary_calls
from ragcache.models import world_file
from ragcache.types import ChunkKV, Tokens

BEHIND = tuple(range(3, 19))
BATCH = 2048  # tokens of a batch; where there is padding, with it and BEHIND

Cost = Callable[[list[int]], int]  # tokens of a batch, from its chunks' lengths


class Padded(TransformersEngine):
    """Chunks as rows of a batch, padded on the right, where causal attention ignores it."""

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        start, width = len(context), max(map(len, chunks))
        kv, layers = self._continued(context, width), self._forward.layers
        for buffers in (kv._keys, kv._values):
            buffers[:] = [t if t is None else t.repeat(len(chunks), 1, 1, 1) for t in buffers]
        kv.begin(width)
        with record_rotary_calls(layers.modules[0]) as calls:
            self.model(
                torch.tensor([[*chunk, *([0] * (width - len(chunk)))] for chunk in chunks]),
                position_ids=torch.arange(start, start + width)[None],
                past_key_values=kv,
                logits_to_keep=1,
            )
        cos, sin = calls[0].cos.float(), calls[0].sin.float()
        capture = [
            (layers.rope.unrotate(keys[:, :, start:], cos, sin), values[:, :, start:])
            for keys, values in map(kv.buffers, range(len(layers.modules)))
        ]
        return [cut(chunk, capture, i, 0) for i, chunk in enumerate(chunks)]


class Masked(TransformersEngine):
    """Chunks in one row, separated by one block-diagonal mask."""

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        forward = self._forward
        pack = PackedForward(forward.config, [len(chunk) for chunk in chunks], len(context))
        ids = [token for chunk in chunks for token in chunk]
        kv, seen = self._continued(context, len(ids)), CaptureKV()
        with forward.driven(kv, ids, pack.positions, seen) as arguments:
            self.model(**arguments, attention_mask=block_diagonal(pack))
        capture = [(k[None], v[None]) for k, v in zip(seen.keys, seen.values, strict=True)]
        firsts = [first for first, _ in pack.spans]
        return [cut(chunk, capture, 0, at) for chunk, at in zip(chunks, firsts, strict=True)]


def block_diagonal(pack: PackedForward) -> Tensor:
    """The mask (1, 1, rows, keys) of a model without sliding windows."""
    rows = pack.spans[-1][1]
    mask = torch.zeros(1, 1, rows, pack.start + rows, dtype=torch.bool)
    mask[..., : pack.start] = True
    for first, end in pack.spans:
        block = mask[..., first:end, pack.start + first : pack.start + end]
        block.copy_(torch.ones_like(block).tril())
    return mask


def cut(chunk: Tokens, layers: Sequence[tuple[Tensor, Tensor]], batch: int, first: int) -> ChunkKV:
    """Rows of one chunk out of keys and values, (batch, kv_heads, rows, head_dim) per layer."""
    rows = slice(first, first + len(chunk))
    keys, values = (
        tuple(copy_to_host(tensor[batch, :, rows], tensor.dtype) for tensor in tensors)
        for tensors in zip(*layers, strict=True)
    )
    return ChunkKV(chunk, keys, values)


def batches(chunks: Sequence[Tokens], cost: Cost) -> Iterator[list[Tokens]]:
    """``chunks`` in order, as many at a time as cost at most BATCH."""
    batch: list[Tokens] = []
    for chunk in chunks:
        if batch and cost([len(one) for one in (*batch, chunk)]) > BATCH:
            yield batch
            batch = []
        batch.append(chunk)
    yield batch


def padded(lengths: list[int]) -> int:
    return len(lengths) * (len(BEHIND) + max(lengths))


def computed(
    model: TransformersEngine, chunks: Sequence[Tokens], cost: Cost
) -> tuple[float, dict[Tokens, ChunkKV]]:
    """Seconds for all that precompute computes of ``chunks``, and what that is."""
    done: dict[Tokens, ChunkKV] = {}
    began = time.perf_counter()
    for batch in batches(chunks, cost):
        alone = model.encode(batch, context=BEHIND)
        done |= {kv.tokens: kv for kv in measure_sensitivity(model, alone, BEHIND)}
    return time.perf_counter() - began, done


def check(got: dict[Tokens, ChunkKV], want: dict[Tokens, ChunkKV]) -> None:
    assert got.keys() == want.keys()
    for tokens, kv in want.items():
        other = got[tokens]
        for a, b in zip(other.keys + other.values, kv.keys + kv.values, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        u, v = torch.tensor(other.sensitivity), torch.tensor(kv.sensitivity)
        torch.testing.assert_close(u, v, atol=1e-5, rtol=1e-3)


def of_the_world(model: TransformersEngine, tokens: int) -> list[int]:
    """The world's paragraphs, the first of them that have about so many tokens."""
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        texts = [text for line in lines for text in json.loads(line)["text"].split("\n\n")]
    lengths: list[int] = []
    for text in texts:
        if sum(lengths) < tokens:
            lengths.append(len(model.tokenize(text)))
    return lengths


def lognormal(_: TransformersEngine, tokens: int) -> list[int]:
    """About so many tokens in chunks of 32 to 512, the median 128."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = math.exp(math.log(128) + 0.7 * float(torch.randn((), generator=generator)))
        lengths.append(min(512, max(32, round(drawn))))
    return lengths


LENGTHS = {"world": of_the_world, "lognormal": lognormal}


@dataclass(frozen=True)
class Row:
    """Tokens per second, by way of computing them."""

    lengths: str
    chunks: str
    gain: float  # packed over by_length, the median within a round
    over_alone: float  # and over alone
    packed: float
    masked: float
    by_length: float  # padded
    padded: float
    alone: float  # one chunk at a time


def measure(
    tokens: int = 2000, *, rounds: int = 3, lengths: Sequence[str] = tuple(LENGTHS)
) -> list[Row]:
    """For each set of lengths, chunks of about ``tokens`` tokens."""
    packed = engine(torch.float32)
    others = [way(packed.model, packed.tokenizer, name=packed.name) for way in (Masked, Padded)]
    return [row(name, LENGTHS[name](packed, tokens), rounds, [packed, *others]) for name in lengths]


def row(name: str, lengths: list[int], rounds: int, models: list[TransformersEngine]) -> Row:
    generator = torch.Generator().manual_seed(1)
    chunks = [tuple(torch.randint(3, 2048, (n,), generator=generator).tolist()) for n in lengths]
    packed, masked, batched = models
    ways = [
        partial(computed, packed, chunks, sum),
        partial(computed, masked, chunks, sum),
        partial(computed, batched, sorted(chunks, key=len), padded),
        partial(computed, batched, chunks, padded),
        partial(computed, packed, chunks, lambda _: BATCH + 1),
    ]
    _, want = ways[0]()
    for way in ways[1:]:
        check(way()[1], want)
    times = [[way()[0] for way in ways] for _ in range(rounds)]
    rates = (sum(lengths) / median(column) for column in zip(*times, strict=True))
    gain = median(by_length / together for together, _, by_length, *_ in times)
    over_alone = median(alone / together for together, *_, alone in times)
    of = f"{len(chunks)} of {min(lengths)} to {max(lengths)}, {mean(lengths):.0f}"
    return Row(name, of, gain, over_alone, *rates)


def table(found: Sequence[Row]) -> str:
    heads = "lengths", "chunks, mean", "packed", "one mask", "padded, sorted", "padded", "alone"
    rows = []
    for one in found:
        rates = (one.packed, one.masked, one.by_length, one.padded, one.alone)
        gains = (f"{one.gain:.2f}x", f"{one.over_alone:.2f}x")
        rows.append([one.lengths, one.chunks, *(f"{r:.0f}" for r in rates), *gains])
    return results.table([*heads, "packed / sorted", "packed / alone"], rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="of chunks, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("packing", found, table(found), out)


if __name__ == "__main__":
    main()
