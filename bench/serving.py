"""Serve and time a request as the package does, and check the results that were timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from bench.results import begin_peak, peak_mib
from ragcache.blend import Blender, blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.lookup import chunk_keys
from ragcache.store.base import ChunkStore, StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.store.prefetch import LayerReader
from ragcache.types import Prompt, Sampling

Key = TypeVar("Key", bound=Hashable)
EXACT = "full", "prefix"  # modes whose answers are the model's own


@dataclass(frozen=True)
class Served:
    """The result of one request. Times are in seconds since its chunks are known."""

    ttft_s: float  # to the first token
    total_s: float  # to the last
    reused: float  # share of the chunks' tokens that was loaded and not computed
    logits: Tensor  # (vocabulary,), which the first token was taken from


def serve(
    answering: LocalGenerator, prompt: Prompt, mode: str | Blender, tokens: int = 1
) -> Served:
    """Resolve, load, fuse, and decode up to ``tokens`` tokens. Misses are stored after the clock
    has stopped."""
    chosen = blender(mode)
    stream = answering.stream(PromptRequest(prompt, chosen, Sampling(max_tokens=tokens)))
    report = stream.answer.report
    assert chosen.reuses == "in_context" or not report.fallbacks, report.fallbacks
    reused = report.reused_tokens / report.chunk_tokens
    return Served(report.ttft_s, report.total_s, reused, stream.first_logits)


def prepare(answering: LocalGenerator, prompt: Prompt) -> list[ChunkKey]:
    """Store the KV of every part of ``prompt``; the keys of its chunks."""
    engine = answering.engine
    keys = list(chunk_keys(prompt, engine.fingerprint, "encoded", answering.encoding, ""))
    precompute(engine, answering.store, [ChunkKey(engine.fingerprint, prompt.prefix), *keys])
    return keys


def read(store: ChunkStore, keys: list[ChunkKey], engine: TransformersEngine | None = None) -> None:
    """Look up the chunks and read all their layers, each released when the next one is read; onto
    the device of ``engine``, if it is given."""
    found = [one for one in map(store.get_header, keys) if isinstance(one, StoredChunk)]
    assert len(found) == len(keys), f"{len(keys) - len(found)} chunks are not stored"
    with LayerReader(store, found, upload=engine.upload if engine else None) as reader:
        reader.start(range(found[0].spec.layers))
        for layer in range(found[0].spec.layers):
            reader.layer(layer)


def clocked(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def medians(works: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, float]:
    """Times that each work reports, in turns, so that disturbances affect all alike."""
    seconds: dict[Key, list[float]] = {what: [] for what in works}
    for _ in range(rounds):
        for what, work in works.items():
            seconds[what].append(work())
    return {what: median(taken) for what, taken in seconds.items()}


def peaks(works: Mapping[Key, Callable[[], object]]) -> dict[Key, int]:
    """Peak memory of the process in MiB during each work; this also warms up."""
    found = {}
    for what, work in works.items():
        begin_peak()
        work()
        found[what] = peak_mib()
    return found


def check(
    engine: TransformersEngine,
    answering: LocalGenerator,
    prompt: Prompt,
    served: Mapping[str, Tensor],
) -> None:
    """Compare the first logits that were ``served``, by mode, with their references.

    Exact modes, and ``fused`` at ratio 1, must give those of the model's own forward; ``reuse``
    those of ``fused`` at ratio 0; and every mode the same in a second run. Raises AssertionError
    with the mode that does not.
    """
    own = forward(engine, prompt)
    same(engine, "fused at ratio 1", serve(answering, prompt, blender("fused", 1.0)).logits, own)
    for mode, logits in served.items():
        if mode in EXACT:
            same(engine, mode, logits, own)
            continue
        again = blender("fused", 0.0) if mode == "reuse" else mode
        same(engine, mode, logits, serve(answering, prompt, again).logits)


@torch.inference_mode()
def forward(engine: TransformersEngine, prompt: Prompt) -> Tensor:
    """Logits after the prompt's last token, (vocabulary,), computed by the bare model."""
    ids = torch.tensor([prompt.tokens], device=engine.device)
    logits: Tensor = engine.model(ids, use_cache=False, logits_to_keep=1).logits
    return logits[0, -1].float().cpu()


def same(engine: TransformersEngine, what: str, given: Tensor, right: Tensor) -> None:
    """AssertionError unless the logits agree up to the rounding of the model's dtype."""
    error = float((given.cpu() - right.cpu()).norm() / right.norm())
    limit = 1e-3 if engine.spec.dtype == "float32" else 5e-2
    assert error < limit, f"{what} is off: its logits differ by {error:.2g} of their norm"
