"""ragcache: the KV of every chunk is stored on disk, and read through the RAM tier."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from bench.peers.protocol import Answered, Ask, Mode, Setup, System, serve
from ragcache.blend import blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import encoding_context
from ragcache.planning.lookup import chunk_keys
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Prompt, Sampling

RAM = 2 << 30  # bytes
MODES = {
    "full": "full",
    "prefix": "prefix",
    "reuse": "reuse",
    "fused .05": "fused:recompute_ratio=0.05",
    "fused .15": "fused:recompute_ratio=0.15",
}


@dataclass
class Ragcache(System):
    generator: LocalGenerator
    folder: Any  # kept until the process ends
    modes = [Mode(name, "full") for name in MODES]
    distributions = ("ragcache-fusion", "torch", "transformers")
    settings = "float32, store on disk with the RAM tier, codec raw"

    def ask(self, ask: Ask) -> Answered:
        prompt = Prompt.of(tuple(ask.prefix), tuple(map(tuple, ask.chunks)), tuple(ask.question))
        request = PromptRequest(prompt, blender(MODES[ask.mode]), Sampling(max_tokens=ask.answer))
        answer = self.generator.stream(request).answer
        report = answer.report
        layers = self.generator.engine.spec.layers
        rows = (sum(report.computed) + report.probe_rows) / layers
        return Answered(list(answer.tokens), report.ttft_s, rows)


def load(setup: Setup) -> Ragcache:
    torch.set_num_threads(setup.threads)
    engine = TransformersEngine.load(setup.model, device="cpu", dtype="float32")
    folder = tempfile.TemporaryDirectory(prefix="ragcache-peers-")
    store = RamTier(DiskStore(folder.name), RAM)
    encoding = encoding_context("prefix", engine)
    whole = Prompt.of(tuple(setup.prefix), tuple(map(tuple, setup.pool)), (0,))
    keys = chunk_keys(whole, engine.fingerprint, "encoded", encoding, "")
    precompute(engine, store, [ChunkKey(engine.fingerprint, whole.prefix), *keys])
    return Ragcache(LocalGenerator(engine, store, encoding), folder)


if __name__ == "__main__":
    serve(load)
