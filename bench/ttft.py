"""Time to first token of every mode against full prefill, over context lengths.

A Llama of about 110M parameters and 16 layers with random weights: time does not depend on their
values. Eight chunks, stored in LMDB and in the page cache. Modes take turns; a row is the median
over rounds, its speed-up the median of ratios within a round. Before timing, ratio 1 is checked
against the model's own logits, and every mode's first logits after timing against those before.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragcache.blend import Blender, blender
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.compiled import compiled
from ragcache.engine.transformers import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.precompute import precompute
from ragcache.resolve import chunk_keys, resolve
from ragcache.show import size
from ragcache.store.base import ChunkStore
from ragcache.store.disk import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.reader import LayerReader
from ragcache.types import Prompt

MODES = ("full", "reuse", "random+full_layers=2", "cacheblend")
CHUNKS = 8


def engine(dtype: torch.dtype) -> TransformersEngine:
    """The random model, with the small model's tokenizer for its template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=32768,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(TINY))
    model: Any = LlamaForCausalLM(config)
    return TransformersEngine(model.to(dtype), tokenizer, name="llama-110m")


def prompt(tokens: int, generator: torch.Generator) -> Prompt:
    """Random ids: 16 of prefix, eight chunks, 32 of question."""
    ids = torch.randint(3, 2048, (tokens,), generator=generator).tolist()
    each = (tokens - 48) // CHUNKS
    chunks = tuple(tuple(ids[16 + i * each : 16 + (i + 1) * each]) for i in range(CHUNKS))
    return Prompt(tuple(ids[:16]), chunks, tuple(ids[-32:]))


def prefill(
    engine: TransformersEngine, store: ChunkStore, given: Prompt, mode: Blender
) -> tuple[float, FusedPrompt]:
    """Seconds from a known prompt to the logits of its first token."""
    began = time.perf_counter()
    resolved = resolve(given, mode, store, engine.fingerprint, compiled=compiled("prefix", engine))
    with LayerReader(store, resolved.stored) as source:
        fused = fuse(engine, mode, resolved.layout, source)
    return time.perf_counter() - began, fused


def measure(
    engine: TransformersEngine, store: ChunkStore, given: Prompt, ratio: float, rounds: int
) -> list[tuple[str, float, float, FusedPrompt, int]]:
    """Per mode: label, median seconds, median speed-up, last result, bytes loaded."""
    modes = {m: blender(m, ratio if "full" != m != "reuse" else None) for m in MODES}
    first = {m: prefill(engine, store, given, b)[1].prefilled.logits for m, b in modes.items()}
    exact = prefill(engine, store, given, blender("cacheblend", 1.0))[1].prefilled.logits
    error = float((exact - first["full"]).norm() / first["full"].norm())
    assert error < (1e-3 if engine.spec.dtype == "float32" else 5e-2), f"ratio 1 is off: {error}"
    times: dict[str, list[float]] = {m: [] for m in modes}
    last: dict[str, FusedPrompt] = {}
    for _ in range(rounds):
        for m, b in modes.items():
            seconds, last[m] = prefill(engine, store, given, b)
            times[m].append(seconds)
    for m, fused in last.items():
        torch.testing.assert_close(fused.prefilled.logits, first[m], atol=1e-2, rtol=1e-2)
    return [
        (
            m,
            median(times[m]),
            median(f / t for f, t in zip(times["full"], times[m], strict=True)),
            last[m],
            sum(layer.load_bytes for layer in last[m].layers),
        )
        for m in modes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    model = engine(getattr(torch, options.dtype))
    table = Table("context", "mode", "TTFT ms", "faster", "charged", "loaded")
    for column in table.columns[2:]:
        column.justify = "right"
    generator = torch.Generator().manual_seed(0)
    for tokens in options.tokens:
        given = prompt(tokens, generator)
        with tempfile.TemporaryDirectory(prefix="ragcache-") as folder, DiskStore(folder) as store:
            prefix = ChunkKey(model.fingerprint, given.prefix)
            keys = chunk_keys(given, model.fingerprint, "compiled", compiled("prefix", model), "")
            precompute(model, store, [prefix, *keys])
            rows = measure(model, store, given, options.ratio, options.rounds)
        for label, seconds, faster, fused, loaded in rows:
            charged = f"{fused.charged_budget:.1%}"
            table.add_row(
                str(tokens), label, f"{1e3 * seconds:.0f}", f"{faster:.2f}x", charged, size(loaded)
            )
    console = Console()
    console.print(
        f"{model.name}, {options.dtype}, ratio {options.ratio}, {CHUNKS} chunks; "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        highlight=False,
    )
    console.print(table)


if __name__ == "__main__":
    main()
