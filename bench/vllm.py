"""Fusion inside vLLM, on the CPU: ``.venv-vllm/bin/python -m bench.vllm`` (see docs/vllm.md).

*Time to first token*: ``generate`` of one token, one prompt at a time, over eight chunks whose KV
is stored, of a random Llama of 110M parameters in float32. Modes take turns within a round,
nothing is in vLLM's prefix cache, a time is the median over rounds. *Full* is vLLM's own prefill,
without a manifest.

*Accuracy*: held-out questions of the small model's world, through vLLM and through the embedded
engine: how many answers are correct, and how many are identical, token by token.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.results import machine, table
from bench.shapes import engine as shaped
from bench.shapes import prompt as random_prompt
from ragcache.blend import blender, written
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.metrics import exact_match
from ragcache.models import TINY, model_path, world_file
from ragcache.planning.context import encoding_context
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import Fingerprint, Prompt, Sampling
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt

TIMED = "full", "reuse", "epic:first_tokens=16", "fused", "cacheblend"
ASKED = "full", "reuse", "fused", "cacheblend", "prophet", "epic:first_tokens=6", "random"
CONTEXTS = 2048, 4096
ANSWER = 8  # tokens


@contextmanager
def started(model: Path | str, store: Path, longest: int) -> Iterator[Any]:
    """An offline vLLM in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=longest,
        max_num_batched_tokens=longest,
        enforce_eager=True,
        worker_cls="ragcache.vllm.cpu.CPUWorker",
        kv_transfer_config={
            "kv_connector": "RagCacheConnector",
            "kv_connector_module_path": "ragcache.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"store": str(store)},
        },
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def ask(
    llm: Any, prompts: Sequence[Prompt], mode: str, model: Fingerprint, tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers to all prompts at once; in mode full, vLLM's own."""
    from vllm import SamplingParams

    given, how = [], []
    for prompt in prompts:
        request: dict[str, Any] = {"prompt_token_ids": list(prompt.tokens)}
        extra = None
        if mode != "full":
            manifest = Manifest.fuse(prompt, written(blender(mode)), model.digest)
            request["cache_salt"], extra = (
                cache_salt(manifest),
                {"kv_transfer_params": manifest.params()},
            )
        given.append(request)
        how.append(SamplingParams(max_tokens=tokens, temperature=0, extra_args=extra))
    done = llm.generate(given, how, use_tqdm=False)
    return [tuple(one.outputs[0].token_ids) for one in done]


def stored(engine: TransformersEngine, store: Any, prompts: Sequence[Prompt]) -> None:
    """Compute and store the KV of everything but the questions."""
    prefixes = {ChunkKey(engine.fingerprint, prompt.prefix) for prompt in prompts}
    chunks = {
        ChunkKey(engine.fingerprint, chunk, prompt.prefix)
        for prompt in prompts
        for chunk in prompt.chunks
    }
    precompute(engine, store, [*prefixes, *chunks])


def times(rounds: int) -> str:
    """The table of times to first token."""
    made = shaped(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        made.model.save_pretrained(path / "model")
        made.tokenizer.save_pretrained(path / "model")
        engine = TransformersEngine.load(path / "model", dtype="float32")
        generator = torch.Generator().manual_seed(0)
        prompts = {tokens: random_prompt(tokens, generator) for tokens in CONTEXTS}
        with DiskStore(path / "store") as store:
            stored(engine, store, list(prompts.values()))
        fingerprint = engine.fingerprint
        del engine, made
        seconds: dict[tuple[str, int], list[float]] = {}
        with started(path / "model", path / "store", max(CONTEXTS) + 64) as llm:
            for number in range(rounds + 1):
                for tokens, prompt in prompts.items():
                    for mode in TIMED:
                        llm.reset_prefix_cache()
                        began = time.perf_counter()
                        ask(llm, [prompt], mode, fingerprint, 1)
                        if number:  # the first round warms up
                            took = time.perf_counter() - began
                            seconds.setdefault((mode, tokens), []).append(took)
    rows = []
    for mode in TIMED:
        cells = [mode]
        for tokens in CONTEXTS:
            mine, full = seconds[mode, tokens], seconds["full", tokens]
            faster = median(b / a for a, b in zip(mine, full, strict=True))
            cells += [f"{median(mine):.2f}", f"{faster:.1f}x"]
        rows.append(cells)
    heads = [h for tokens in CONTEXTS for h in (f"{tokens} tokens, s", "against full")]
    return table(["mode", *heads], rows)


def accuracy(questions: int) -> str:
    """The table of correct and of identical answers."""
    engine = TransformersEngine.load(model_path(TINY), dtype="float32")
    contexts = first_questions(load_dataset(world_file("prompts.jsonl")), questions)
    asked = [
        (engine.template.prompt(context.chunks, question.text), question.answers)
        for context in contexts
        for question in context.questions
    ]
    prompts, held, how = (
        [prompt for prompt, _ in asked],
        MemoryStore(),
        encoding_context("prefix", engine),
    )
    stored(engine, held, prompts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with DiskStore(path) as store:
            stored(engine, store, prompts)
        with started(model_path(TINY), path, 1024) as llm:
            for mode in ASKED:
                got = ask(llm, prompts, mode, engine.fingerprint, ANSWER)
                answering = LocalGenerator(engine, held, how, store_misses=False)
                right = mine = same = 0
                for (prompt, answers), tokens in zip(asked, got, strict=True):
                    sampling = Sampling(max_tokens=ANSWER)
                    want = answering.stream(PromptRequest(prompt, blender(mode), sampling)).answer
                    text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
                    right += exact_match(text, answers)
                    mine += exact_match(want.text, answers)
                    same += tokens == want.tokens
                count = len(asked)
                cells = (right / count, mine / count, same / count)
                rows.append([mode, *(f"{100 * cell:.1f} %" for cell in cells)])
    return table(["mode", "right in vLLM", "right, embedded", "the same"], rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=300)
    given = parser.parse_args()
    print(machine(), "\n")
    if given.rounds:
        print(times(given.rounds))
    if given.questions:
        print(accuracy(given.questions))


if __name__ == "__main__":
    main()
