"""Plain transformers: the whole prompt is computed, into a DynamicCache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bench.peers.protocol import Answered, Ask, Mode, Setup, System, serve


@dataclass
class Transformers(System):
    model: Any
    modes = [Mode("full", "full")]
    distributions = ("transformers", "torch")
    settings = "float32, SDPA, logits of the last row only"

    @torch.inference_mode()
    def ask(self, ask: Ask) -> Answered:
        began = time.perf_counter()
        cache, fed, tokens = DynamicCache(config=self.model.config), ask.ids, list[int]()
        ttft = 0.0
        while len(tokens) < ask.answer:
            given = torch.tensor([fed])
            logits = self.model(given, past_key_values=cache, logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
            ttft = ttft or time.perf_counter() - began
            if tokens[-1] in end_tokens(self.model):
                break
            fed = tokens[-1:]
        return Answered(tokens, ttft, len(ask.ids))


def end_tokens(model: Any) -> set[int]:
    """The ids that end an answer."""
    given = model.generation_config.eos_token_id
    return set(given) if isinstance(given, list) else {given}


def load_model(setup: Setup) -> Any:
    torch.set_num_threads(setup.threads)
    return AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32).eval()


def load(setup: Setup) -> Transformers:
    return Transformers(load_model(setup))


if __name__ == "__main__":
    serve(load)
