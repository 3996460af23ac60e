"""Questions in the order of their chunks: ``python -m bench.batch``.

Requests per second of ``ragcache batch`` over the same questions, in the order of the file and
reordered so that questions over the same chunks follow each other. Each request has four chunks,
drawn by Zipf's law (exponent 1), of which ``fused`` recomputes 5 %, and an answer of one token; the
RAM tier has room for 10 % of all chunks, decoded. The KV is stored as ``cachegen``, as for a small
or slow disk: chunks that are not in RAM are decoded at about 100 MB/s, which takes longer here than
computing. Orders take turns, each with an empty RAM tier, and answers are checked to be the same.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import results
from ragcache.api.batch_file import iter_answer_batch, read_batch
from ragcache.batch.order import loaded_bytes, order_by_chunks
from ragcache.core.precompute import drive, precompute
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.sim.trace import zipf_trace
from ragcache.store.disk.store import DiskStore
from ragcache.types import Chunk

SHARE = 0.1  # share of all chunks for which the RAM tier has room
WORDS = 160  # words of a chunk: about 260 tokens
_VOCABULARY = (
    "mill river boats Oslo parrot cello harbour clocks painter bridge May town note".split()
)


@dataclass(frozen=True)
class Row:
    """One way to answer."""

    order: str
    requests: int
    chunks: int  # of the corpus
    seconds: float  # median over rounds
    loaded: float  # share of the chunks' bytes that was not in RAM
    gain: float  # requests per second over those in input order, the median within a round


def model() -> TransformersEngine:
    """A random model with much KV for its size: as many KV heads as query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
        max_position_embeddings=4096,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(TINY))
    made: Any = LlamaForCausalLM(config)
    return TransformersEngine(made, tokenizer, name="llama-many-heads", codec="cachegen")


def write(path: Path, requests: int, chunks: int, per_request: int) -> list[str]:
    """A file of requests; the texts of all chunks."""
    rng = random.Random(0)
    texts = [f"Note {n}: {' '.join(rng.choices(_VOCABULARY, k=WORDS))}." for n in range(chunks)]
    with path.open("w", encoding="utf-8") as file:
        for request in zipf_trace(requests, chunks, per_request=per_request):
            documents = [texts[int(asked.id.removeprefix("chunk"))] for asked in request]
            messages = [{"role": "user", "content": "What is by the river?"}]
            body = {"model": "ragcache", "messages": messages, "documents": documents}
            line = {"custom_id": str(file.tell()), "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return texts


def measure(
    requests: int = 500, *, chunks: int = 250, per_request: int = 4, rounds: int = 1
) -> list[Row]:
    with TemporaryDirectory(prefix="ragcache-") as folder:
        root, engine = Path(folder), model()
        texts = write(root / "q.jsonl", requests, chunks, per_request)
        keys = _fill(engine, root / "store", texts)
        size = engine.spec.chunk_bytes(sum(map(len, keys)))
        ram = int(SHARE * size)
        times: dict[str, list[float]] = {"input": [], "by chunks": []}
        for _ in range(rounds):
            for order, took in times.items():
                took.append(_timed(engine, root, ram, order))
        _check(root)
        shares = _shares(root / "q.jsonl", dict(zip(texts, keys, strict=True)), engine, ram)
    gains = [a / b for a, b in zip(times["input"], times["by chunks"], strict=True)]
    return [
        Row("input", requests, chunks, median(times["input"]), shares[0], 1.0),
        Row("by chunks", requests, chunks, median(times["by chunks"]), shares[1], median(gains)),
    ]


def _opened(engine: TransformersEngine, path: Path, ram: int) -> RagCache:
    settings = Settings.load(ram_bytes=ram, ratio=0.05, max_tokens=1)
    return RagCache(engine, DiskStore(path), HashEmbedder(), path, settings)


def _fill(engine: TransformersEngine, path: Path, texts: Sequence[str]) -> list[tuple[int, ...]]:
    with _opened(engine, path, 0) as cache:
        keys = [cache.indexing.key(Chunk("bench", n, text)) for n, text in enumerate(texts)]
        precompute(engine, cache.store, [cache.indexing.prefix_key, *keys])
    return [key.tokens for key in keys]


def _timed(engine: TransformersEngine, root: Path, ram: int, order: str) -> float:
    with _opened(engine, root / "store", ram) as cache:
        out = root / f"{order}.jsonl"
        began = time.perf_counter()
        asked = read_batch(root / "q.jsonl")
        done = drive(iter_answer_batch(cache, asked, out, reorder=order == "by chunks"), None)
        took = time.perf_counter() - began
    assert done.answered == len(asked) and not done.failed
    return took


def _check(root: Path) -> None:
    answers = []
    for order in ("input", "by chunks"):
        lines = (root / f"{order}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert all(
            chunk["miss"] is None
            for one in found
            for chunk in one["response"]["body"]["ragcache"]["chunks"]
        )
        answers.append([one["response"]["body"]["choices"][0]["message"] for one in found])
    assert answers[0] == answers[1]


def _shares(
    file: Path, tokens: dict[str, tuple[int, ...]], engine: TransformersEngine, ram: int
) -> tuple[float, float]:
    """The share of the requested bytes that is not in RAM, in both orders."""
    lines = file.read_text(encoding="utf-8").splitlines()
    used = [json.loads(line)["body"]["documents"] for line in lines]
    sizes = {text: engine.spec.chunk_bytes(len(ids)) for text, ids in tokens.items()}
    total = sum(sizes[text] for texts in used for text in texts)
    given = loaded_bytes(used, range(len(used)), sizes, ram)
    return given / total, loaded_bytes(used, order_by_chunks(used, sizes, ram), sizes, ram) / total


def table(found: Sequence[Row]) -> str:
    heads = "order", "requests", "chunks", "requests/s", "loaded", "over input order"
    rows = [
        [
            one.order,
            str(one.requests),
            str(one.chunks),
            f"{one.requests / one.seconds:.1f}",
            f"{100 * one.loaded:.0f} %",
            f"{one.gain:.2f}x",
        ]
        for one in found
    ]
    return results.table(heads, rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--chunks", type=int, default=250)
    parser.add_argument("--per-request", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("batch", found, table(found), out)


if __name__ == "__main__":
    main()
